import pytest

from clplat.files import put_parts

PAGE = "a\n<!-- generated: one -->\nold\n<!-- end: one -->\nb\n"


def test_a_part_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    put_parts(page, {"one": r"new \1"})
    assert page.read_text() == PAGE.replace("old\n", "\nnew \\1\n\n")
    put_parts(page, {"one": "newer"})
    assert page.read_text() == PAGE.replace("old\n", "\nnewer\n\n")


def test_a_part_that_is_not_there_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match="has 0 parts two, not one"):
        put_parts(page, {"two": "new"})
    assert page.read_text() == PAGE
