"""`extends: NAME`: a recipe that gives only the keys that differ from another recipe.

Mappings are merged key by key, anything else is replaced. Exceptions: `data` and `eval_data` are replaced whole (they are lists
of sources, even if a single source is given), a stage of another objective replaces the parent's whole, and `name` and `out`
are never inherited. `stages: {simcse: null}` removes a stage.
"""

from __future__ import annotations

from pathlib import Path

from l2v.errors import RecipeError
from l2v.recipe.safety import refuse_unsafe
from l2v.recipe.shipped import recipe_folder
from l2v.recipe.typed_yaml import Node, kind_of, nearest, read_tree

WHOLE = ("data", "eval_data")
OWN = ("name", "out")


def read_recipe(path: Path) -> Node:
    """The tree of a recipe file with what it extends merged in; every node knows the file and line that it comes from.

    Raises:
        RecipeError: for a parent that is not found or that leads back to the file, and for what no recipe may hold.
    """
    return _read(path, [])


def extended(path: Path) -> list[str]:
    """The recipes that a file extends, nearest first, by the names it gives."""
    names, tree = [], read_tree(path)
    while (node := _extends(tree)) is not None:
        names.append(str(node.value))
        path = _parent(path, node)
        if len(names) > len(set(names)):  # a circle, which read_recipe rejects
            break
        tree = read_tree(path)
    return names


def _read(path: Path, children: list[tuple[Path, str]]) -> Node:
    """children: the files that extend this one, each with the place of its `extends`, the first first."""
    tree = read_tree(path)
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.where}: a recipe is a mapping of keys; found {kind_of(tree.value)}")
    if children:
        refuse_unsafe(tree)
    node = _extends(tree)
    tree.value.pop("extends", None)
    if node is None:
        return tree
    parent = _parent(path, node)
    children = [*children, (path.resolve(), node.where)]
    circle = next((where for file, where in children if file == parent.resolve()), None)
    if circle is not None:
        if len(children) == 1:
            raise RecipeError(f"{node.where}: the recipe extends itself; name another one")
        raise RecipeError(f"{node.where}: extends '{node.value}' is circular: that recipe extends this one ({circle})")
    return _merged(_read(parent, children), tree)


def _extends(tree: Node) -> Node | None:
    node = tree.value.get("extends") if isinstance(tree.value, dict) else None
    if node is None or node.value is None:
        return None
    if not isinstance(node.value, str):
        raise RecipeError(f"{node.where}: extends is text, a file or the name of a recipe; found {kind_of(node.value)}")
    return node


def _parent(path: Path, node: Node) -> Path:
    """The file that `extends` names: next to the child (or absolute), else a recipe shipped with l2v."""
    name = node.value
    sibling = path.parent / Path(name).expanduser()
    if sibling.is_file():
        return sibling
    shipped = recipe_folder() / f"{name}.yaml"
    if Path(name).name == name and shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in recipe_folder().glob("*.yaml")))
    raise RecipeError(f"{node.where}: extends '{name}', which is neither a file ({sibling}) nor one of {known}")


def _merged(parent: Node, child: Node) -> Node:
    """The child over the parent, at the top of a recipe."""
    inherited = {key: node for key, node in parent.value.items() if key not in OWN}
    _split_base(inherited, child.value)
    _settle_zero(inherited, child.value)
    stages, own = inherited.get("stages"), child.value.get("stages")
    out = _over(Node(inherited, parent.where), child)
    if stages is not None and own is not None and isinstance(stages.value, dict) and isinstance(own.value, dict):
        out.value["stages"] = _stages(stages, own)
    return out


def _over(parent: Node, child: Node) -> Node:
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    out = dict(parent.value)
    for key, node in child.value.items():
        out[key] = _over(out[key], node) if key in out and key not in WHOLE else node
    return Node(out, child.where)


def _stages(parent: Node, child: Node) -> Node:
    out = dict(parent.value)
    for name, node in child.value.items():
        if node.value is None:
            if name not in out:
                raise RecipeError(f"{node.where}: no stage '{name}' to remove{nearest(name, out)}")
            del out[name]
        elif name in out and _objective(node) in (None, _objective(out[name])):
            out[name] = _over(out[name], node)
        else:
            out[name] = node
    return Node(out, child.where)


def _objective(stage: Node) -> object:
    node = stage.value.get("objective") if isinstance(stage.value, dict) else None
    return node and node.value


def _split_base(parent: dict[str, Node], child: dict[str, Node]) -> None:
    """`base: NAME` on either side is `base: {model: NAME}`."""
    for side in (parent, child):
        base = side.get("base")
        if base is not None and isinstance(base.value, str):
            side["base"] = Node({"model": base}, base.where)


def _settle_zero(parent: dict[str, Node], child: dict[str, Node]) -> None:
    """A child's DeepSpeed file decides the stage that the parent names."""
    above, own = parent.get("zero"), child.get("zero")
    if above is None or own is None or not isinstance(above.value, dict) or not isinstance(own.value, dict):
        return
    if "config" in own.value and "stage" not in own.value:
        parent["zero"] = Node({key: node for key, node in above.value.items() if key != "stage"}, above.where)
