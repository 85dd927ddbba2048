"""Danish text to sentences: abbreviations, ordinals, initials and numbers that end in a full stop do not end a sentence.

`l2v.data.text` holds the published recipe's plain rule; this module is used when data is built from raw text.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEVER_LAST = _words(
    """    adm. adr. afd. afg. afs. alm. amr. ang. ank. anm. apr. att. aug. bd. bek. bibl. bl.a. ca. cand. cf. chr.
    cirk. d. d.d. d.v.s. dec. dr. dvs. eftf. eks. ekskl. eng. evt. f. f.eks. feb. febr. fg. fhv. forb. forts.
    fr. frk. gl. gml. gr. h.c. hhv. hr. i.e. i.f.m. i.f.t. i.h.t. iflg. ifm. ift. iht. ill. incl. indb. inkl.
    ital. jan. jf. jfr. jul. jun. jvf. kbh. kgl. kl. komm. kr.f. kt. lb. lic. m.h.t. m.v.h. maks. mdl. mgr. mht.
    milj. mr. mrs. nov. nr. nuv. obj. okt. omg. omtr. opr. ovenn. ovf. p.g.a. p.t. pag. pers. pga. pinx. pk.
    plur. pr. prof. præs. pt. resp. s. sct. sept. sgt. skt. sml. smlgn. st. stk. suppl. sv. t. t.ex. t.o.m.
    tidl. tlf. udg. ugtl. undt. v. v.h.a. vb. vdr. vedr. vha. vol. vs. å. årg. årh. ø.
    """
)
"""Abbreviations that never end a sentence; those of one letter only in lower case."""
WORDS_TOO = _words(
    """arb. art. aut. bem. def. dir. div. fig. fl. fork. fær. kand. kap. lat. lok. mag. min. par. pol. red. ref.
    reg. sek. sen. sing. spec. str. stud. tab. ty.
    """
)
"""Abbreviations that are also words ("et par."): they end a sentence if the next word is one of STARTERS."""
DEGREES = _words("cand stud mag dr lic bac")
MAY_BE_LAST = _words(
    """osv. m.m. m.v. mv. m.fl. mfl. etc. o.l. ol. o.lign. o.a. o.m.a. f.kr. e.kr. kr. mio. mia. mill. pct. km. cm. kg. tdr.
    d.å. s.å. u.å. inc. ltd. a/s. aps. o.s.v. e.l. el.lign. m.a. s.u. ibid. jr. sr. f.t.a. f.v.t. e.v.t. rev. ff. m. hk.
    """
)
"""Abbreviations that end a sentence unless a digit follows."""
MONTHS = _words("januar februar marts april maj juni juli august september oktober november december")
ORDINAL_BEFORE = _words(
    """d. den det de i på fra til kong konge dronning prins pave kejser christian frederik margrethe valdemar erik knud
    oluf christoffer hans gustav carl karl ludvig johannes paul pius benedikt henrik alexander nikolaj wilhelm og hver
    sin sit min din vor deres hendes hans
    """
)
"""Words after which a number with a full stop is an ordinal: "den 2. Verdenskrig", "Christian 4."."""
STARTERS = _words(
    """han hun det den de der da dette denne disse i på men og så når hvis efter før under siden samme her nu jeg vi man
    ingen alle flere mange en et som ved med til fra for om også derfor dog desuden senere siden først hans hendes deres
    hvad hvor hvem hvorfor hvordan kun selv både mens imidlertid du mit dit din vores ifølge blandt ud op ned ved
    """
)
"""Words that begin a sentence after a number or an initial rather than continue a name."""
_BREAK = re.compile(
    r"""(?P<mark>[.!?…]+)(?P<close>["'”’»«)\]]*)(?P<space>\s+)(?P<open>["'“”„»«(\[–—-]*\s?)(?P<next>\w)"""
)
_WORD_BEFORE = re.compile(r"(\S+)$")
_NEXT_WORD = re.compile(r"[\w.]+")
_NUMBER = re.compile(r"^\(?\d{1,3}$")
REACH = 80
"""Characters inspected before a full stop, so that the time grows linearly with the length of a line."""
_STRIP = "\"'“”„»«([{–—-"


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, none empty; a line break always ends one."""
    out = []
    for line in text.split("\n"):
        start = 0
        at = 0
        while match := _BREAK.search(line, at):
            end = match.end("close")
            if _ends(line, match):
                out.append(line[start:end].strip())
                start = end
            at = max(end, match.start() + 1)
        out.append(line[start:].strip())
    return [part for part in out if part]


def _ends(line: str, match: re.Match[str]) -> bool:
    first = match["next"]
    if not (first.isupper() or first.isdigit()):
        return False
    if match["mark"] != ".":
        return True
    if first.isdigit() and match["close"]:
        return True
    end = match.start("mark")
    near = line[max(0, end - REACH) : end]
    before = _WORD_BEFORE.search(near)
    if before is None:
        return True
    word = before.group(1).lstrip(_STRIP)
    token = f"{word.casefold()}."
    word_after = _NEXT_WORD.match(line, match.start("next"))
    following = word_after.group(0) if word_after else ""
    last = following.rstrip(".").casefold()
    if match["close"] and token not in NEVER_LAST:
        return True
    if token in NEVER_LAST and (len(word) > 1 or word.islower()):
        return False
    earlier = _WORD_BEFORE.search(near[: before.start()].rstrip())
    previous = earlier.group(1).lstrip(_STRIP) if earlier else ""
    if token in WORDS_TOO or _degree(word, previous):
        return last in STARTERS
    if token in MAY_BE_LAST:
        return not first.isdigit()
    if _NUMBER.match(word):
        return _after_number(word, previous, first, last)
    if (len(word) == 1 and word.isalpha()) or re.fullmatch(r"(\w\.)+\w", word):
        # an initial ("J. P. Jacobsen", "H.C. Andersen"), unless a word that begins sentences follows
        return word.isupper() and last in STARTERS and not first.isdigit() and not _name(previous)
    return True


def _after_number(word: str, previous: str, first: str, last: str) -> bool:
    if last in MONTHS or first.isdigit():
        return False
    if last in STARTERS:
        return True
    return previous.rstrip(",").casefold() not in ORDINAL_BEFORE


def _name(word: str) -> bool:
    return word[:1].isupper() and (word.endswith(".") or len(word) > 1)


def _degree(word: str, previous: str) -> bool:
    """The end of "cand.mag." or "stud. med."."""
    return word.partition(".")[0].casefold() in DEGREES or previous.rstrip(".").casefold() in DEGREES
