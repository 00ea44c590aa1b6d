"""Tables of parts and of groups: what they say, and each way in which one can be wrong."""

from __future__ import annotations

import pytest

from isic.tables import groups_of, listed_ids, read_groups, read_parts
from runtime.errors import UserError


@pytest.fixture
def table(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "table.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_groups_by_id_whatever_else_the_table_holds(table):
    # a byte-order mark, capitals, spaces, further columns and empty lines, as spreadsheets write them
    path = table("\ufeffgroup, ID ,age\r\np1,a,50\r\n p1 , b ,\r\n\r\n7,c,3\r\n")
    assert read_groups(path) == {"a": "p1", "b": "p1", "c": "7"}


def test_an_accent_spelt_in_two_ways_is_one_id(table):
    assert read_groups(table("id,group\ne\u0301,1\n")) == {"\u00e9": "1"}


def test_parts_by_either_of_their_names(table):
    path = table("id,part\na,train\nb,Training\nc,val\nd,validation\ne,TEST\n")
    assert read_parts(path) == {"a": "train", "b": "train", "c": "validation", "d": "validation", "e": "test"}


@pytest.mark.parametrize(("text", "message"), [
    ("", "has no column id; its first line must name the columns id and group, and is ''"),
    ("id;group\na;1\n", "has no column id; its first line must name the columns id and group, and is 'id;group'"),
    ("id,patient\na,1\n", "has no column group"),
    ("id,group\n", "lists no image; write a line for each, with its id and its group"),
    ("id,group\na,1\nb,\n", "line 3: the group is missing; write one, or leave the line out"),
    ("id,group\na,1\nb\n", "line 3: the group is missing"),
    ("id,group\n,1\n", "line 2: the id is missing"),
    ("id,group\na,1\na,1\n", "line 3: a is listed twice; keep one line"),
    ('id,group\na,"1\n', "is not a CSV file in UTF-8"),
    (b"id,group\n\xff,1\n", "is not a CSV file in UTF-8"),
])
def test_a_table_that_is_wrong_is_one_line(table, text, message):
    path = table(text)
    with pytest.raises(UserError) as caught:
        read_groups(path)
    assert message in str(caught.value) and str(caught.value).startswith(f"--groups {path}") and "\n" not in str(caught.value)


def test_an_unknown_part_and_a_missing_file_are_named(table, tmp_path):
    with pytest.raises(UserError, match="a is in part 'testing'; write training, validation or test"):
        read_parts(table("id,part\na,testing\n"))
    with pytest.raises(UserError, match="has no column part"):
        read_parts(table("id,group\na,1\n"))
    with pytest.raises(UserError, match="cannot read --split .*nowhere.csv: No such file"):
        read_parts(tmp_path / "nowhere.csv")


def test_ids_that_do_not_exist_are_counted_and_the_first_is_named(tmp_path):
    assert listed_ids(["a", "b", "c"], {"c": "train", "a": "test"}, "--split x", tmp_path) == ["a", "c"]
    with pytest.raises(UserError, match=f"--split x lists 2 images that are not in {tmp_path}, the first of them d; "):
        listed_ids(["a", "b"], {"e": "train", "a": "test", "d": "test"}, "--split x", tmp_path)


def test_images_without_a_group_are_counted(capsys):
    assert groups_of(["a", "b", "c"], {"a": "1", "x": "1"}, "--groups x") == {"a": "1"}
    assert capsys.readouterr().err == "2 of 3 images are not in --groups x; each of them stands for itself\n"
    assert groups_of(["a"], {"a": "1"}, "--groups x") == {"a": "1"}
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--groups x lists none of the 2 images, but y for example"):
        groups_of(["a", "b"], {"y": "1"}, "--groups x")
    assert groups_of(["a", "b"], {"y": "1"}, "--groups x", may_be_none=True) is None
    assert "none of 2 images" in capsys.readouterr().err
