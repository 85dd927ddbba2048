import pytest

from l2v.data.danish import sentences

CASES = [
    ["Hun købte frugt, f.eks. Æbler fra Fyn, på torvet.", "Bagefter gik hun hjem."],
    ["Mødet holdes d. 5. maj i Odense.", "Alle er velkomne."],
    ["Toget går kl. 14.30 fra Aarhus.", "Det er fremme kl. 17."],
    ["Chr. IV byggede Rundetårn.", "Det står endnu."],
    ["Christian 4. Slotte findes overalt.", "De er kendte."],
    ["Han blev født i 1864.", "Hans far var smed."],
    ["Den 2. Verdenskrig sluttede i 1945.", "Landet var frit."],
    ["Prisen er ca. 300 kr. pr. person.", "Børn er gratis."],
    ["Det koster 300 kr.", "Børn er gratis."],
    ["Vi så løver, tigre osv.", "Turen varede en time."],
    ["H.C. Andersen skrev eventyr.", "De er oversat til mange sprog."],
    ["J. P. Jacobsen var botaniker.", "Han skrev romaner."],
    ["Bl.a. Aarhus og Aalborg er med.", "Odense er ikke."],
    ["Dr. Jensen kommer kl. 8.", "Han har travlt."],
    ["Kommer du?", "Ja!", "Godt."],
    ["Hun spurgte: »Kommer du?«", "Ingen svarede."],
    ["»Kommer du?« spurgte hun.", "Ingen svarede."],
    ['Han sagde: "Nu går vi."', "Så gik de."],
    ["Byen har 12.500 indbyggere.", "Den ligger ved en å."],
    ["Se s. 12 og fig. 3.", "Tabellen står bagerst."],
    ["Prof. Hansen og hr. Olsen mødtes.", "De var uenige."],
    ["Det skete ca. 500 f.Kr.", "Byen voksede hurtigt."],
    ["Jf. Grundlovens § 77 er der ytringsfrihed.", "Censur er forbudt."],
    ["Kongen boede på Skt. Hans Gade.", "Gaden er lang."],
    ["Den 1. januar 1973 blev Danmark medlem.", "Det samme gjorde Irland."],
    ["Mødet er den 3. Maj er en god måned."],
    ["Han kom på en 3. plads.", "Holdet jublede."],
    ["Frederik 9. var sømand.", "Han var også dirigent."],
    ["Dronning Margrethe 2. Regerede i 52 år."],
    ["Der er sol, regn m.m.", "Husk en paraply."],
    ["Hun arbejder hos Novo Nordisk A/S.", "Firmaet ligger i Bagsværd."],
    ["Vent...", "Hvad var det?"],
    ["Han tøvede... og gik så.", "Døren smækkede."],
    ["Nej!", "Det må du ikke!"],
    ["(Se kap. 4.)", "Kapitlet er kort."],
    ["Tlf. 12 34 56 78 er åben hele døgnet.", "Ring bare."],
    ["Der var inkl. Moms 500 kr. at betale.", "Det var dyrt."],
    ["Pga. Corona blev festen aflyst.", "Alle var kede af det."],
    ["Klokken er 14.30.", "Toget er kørt."],
    ["Første linje uden punktum", "Anden linje."],
    ["Hun spiser C-vitamin og vitamin D.", "Det hjælper."],
    ["3 ud af 4 svarede ja.", "1 svarede nej."],
    ["Vi mødes i Kbh. K på torsdag.", "Tag madpakke med."],
    ["Hr. og fru Berg bor i st. tv.", "De har en hund."],
    ["Åen er 5 km lang.", "Ærø er en ø."],
    ["9. klasse har fri kl. 12.", "Alle jubler."],
    ["Borgmester Jens Chr. Skou tog ordet.", "Salen blev stille."],
    ["Bogen (2. udg.) er udsolgt.", "Der kommer en ny."],
    ["Firmaet har 1.000 ansatte, jf. årsrapporten 2020.", "Tallet vokser."],
    ["Det var i uge 7.", "Skolerne holdt lukket."],
    ["Hun bor på 3. sal.", "Der er ingen elevator."],
    ["Nr. 1 blev Ida, nr. 2 blev Bo.", "Nr. 3 fik ingenting."],
    ["Det var et godt par.", "De blev gift i maj."],
    ["Bogen er min.", "Du må låne den."],
    ["Red. Poul Lund skrev lederen.", "Den var lang."],
    ["Sml. Ordbog over det danske Sprog, bd. 2.", "Den er fra 1920."],
    ["Mag. art. Bo Lund, cand.mag. Ea Holm og stud. med. Ib Friis talte.", "Salen lyttede."],
]


@pytest.mark.parametrize("parts", CASES, ids=[c[0][:40] for c in CASES])
def test_hand_written_cases(parts):
    between = "\n" if parts[0].endswith("punktum") else " "
    assert sentences(between.join(parts)) == parts


def test_there_are_at_least_forty_cases():
    assert len(CASES) >= 40


def test_no_word_is_lost_or_added():
    text = " ".join(part for case in CASES for part in case)
    assert " ".join(sentences(text)).split() == text.split()


@pytest.mark.parametrize("text", ["", "  ", "\n\n", "."])
def test_what_holds_no_sentence(text):
    assert sentences(text) == ([text] if text.strip() else [])


def test_a_long_line_takes_time_in_proportion():
    assert len(sentences("Hun bor i Aarhus, f.eks. Viby. " * 20_000)) == 20_000
