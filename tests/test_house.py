"""The program that holds the house to its four numbers sees what is too large."""

from pathlib import Path

from tests.house import measures, report


def sizes(text: str) -> dict[tuple[str, str], int]:
    return {(measure.what, measure.name): measure.size for measure in measures(Path("x.py"), text)}


def test_decorators_count_and_self_does_not() -> None:
    text = "class A:\n    @one\n    @two\n    def __init__(self, a, /, b, *c, d, **e):\n        pass\n"
    assert sizes(text) == {("file", "x.py"): 5, ("class", "A"): 5, ("function", "__init__"): 4, ("constructor", "__init__"): 5}


def test_nothing_hides_in_another_function_a_coroutine_or_a_new() -> None:
    inner = "    async def g():\n        class B:\n            def __new__(cls, a, b):\n                pass\n"
    found = sizes(f"def f():\n{inner}")
    assert found[("function", "g")] == 4
    assert found[("class", "B")] == 3
    assert found[("constructor", "__new__")] == 2


def test_a_dataclass_may_have_any_number_of_fields() -> None:
    fields = "".join(f"    f{n}: int\n" for n in range(20))
    assert ("constructor", "__init__") not in sizes(f"@dataclass\nclass A:\n{fields}")


def test_what_is_too_large_is_named_with_its_place_and_is_a_failure() -> None:
    body = "    x = 1\n" * 60
    lines, code = report([*measures(Path("x.py"), f"class B:\n    def __init__(self):\n        pass\n\n\ndef f():\n{body}")])
    assert code == 1
    assert lines[0] == "x.py:6: function f: 61, at most 60"


def test_the_largest_of_each_kind_is_told() -> None:
    lines, code = report([*measures(Path("x.py"), "class B:\n    def __init__(self):\n        pass\n")])
    assert code == 0
    assert [line.split(":")[0] for line in lines] == ["largest class", "largest constructor", "largest file", "largest function"]
