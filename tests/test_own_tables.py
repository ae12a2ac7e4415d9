"""A table of one's own as spreadsheets and programs write it: separators, encodings, empty rows and
fields, columns that are there twice or are spelled otherwise"""

import pytest

from asap.data.adapter import get_cohort
from asap.data.cohorts.own import NoUsableCaseError

HEAD = "case,image,patient,report\n"
ROWS = '1,a.nii,p1,"FINDINGS: Größe normal.\nIMPRESSION: Normal."\n2,b.nii,p2,Emphysema.\n'


@pytest.fixture
def read(tmp_path):
    "Write a table beside two scans and read the cohort: table, reasons for what is left out"
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).write_bytes(b"")

    def read(text, written="utf8", **options):
        data = text if isinstance(text, bytes) else text.encode(written)
        (tmp_path / "cases.csv").write_bytes(data)
        table, bad = get_cohort("own").read(tmp_path, **options)
        return table, {r["case"]: r["reason"] for r in bad.rows}

    return read


def is_whole(result) -> bool:
    table, bad = result
    return (
        list(table.case) == ["1", "2"]
        and table.findings[0] == "Größe normal."
        and table.findings[1] == "Emphysema."
        and not bad
    )


@pytest.mark.parametrize("encoding", "utf8 utf-8-sig utf-16 utf-16-le utf-16-be cp1252".split())
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_and_encodings_that_are_certain(encoding, separator, read):
    assert is_whole(read((HEAD + ROWS).replace(",", separator), encoding))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.removesuffix("\n"),
        lambda t: t.replace("\n", "\r\n"),
        lambda t: "sep=,\n" + t,
        lambda t: t + ",,,\n,,,\n",
        lambda t: t.replace("2,b", ",,,\n , , ,\n\n2,b"),
        lambda t: t + ",,,,,,\n\n",
        lambda t: t.replace("report\n", "report,,\n").replace("Emphysema.", "Emphysema.,,"),
        lambda t: t.replace("case", " Case ").replace("image", "IMAGE").replace("report", "Report"),
    ],
    ids=["end", "windows", "sep", "empty", "middle", "wide", "columns", "case"],
)
def test_what_spreadsheets_add(change, read):
    assert is_whole(read(change(HEAD + ROWS)))


@pytest.mark.parametrize("encoding, other", [("cp1254", "cp1252"), ("cp1250", "cp1252")])
def test_an_encoding_that_is_not_certain_is_asked_for(encoding, other, read):
    word = "Şüphe" if encoding == "cp1254" else "Głębokość"
    text = HEAD + ROWS.replace("Größe", word)
    with pytest.raises(
        ValueError, match=f"(?s){other} reads.*{encoding} reads.*cohorts.own.encoding"
    ):
        read(text, encoding)
    assert read(text, encoding, encoding=encoding)[0].findings[0] == f"{word} normal."


def test_cyrillic_is_not_taken_for_latin(read):
    with pytest.raises(ValueError, match="cp1251 reads"):
        read(HEAD + "1,a.nii,p1,Норма\n", "cp1251")
    assert read(HEAD + "1,a.nii,p1,Норма\n", "cp1251", encoding="cp1251")[0].findings[0] == "Норма"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\3\4 and more", "workbook of Excel"),
        (HEAD.encode() + b"1,a.nii,p1", "row 2 has 3 fields, expected 4"),
        (b"case;image;patient;report,x|y\n1;a;p;r,x|y\n", "no column `case`"),
        (b"", "broken or no CSV"),
    ],
)
def test_tables_that_cannot_be_read(data, message, read):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read(data)


@pytest.mark.parametrize("word", "nan NaN None NULL #NAME? #N/A n/a -".split())
def test_words_for_nothing_are_no_report_and_no_label(word, read):
    table, bad = read(HEAD + ROWS + f"3,a.nii,p3,{word}\n")
    assert list(table.case) == ["1", "2"] and bad == {"3": "no report"}
    table, bad = read(f"case,image,patient,report,Emphysema\n1,a.nii,p1,Clear.,{word}\n")
    assert table["label:Emphysema"].isna().all() and not bad
    with pytest.raises(NoUsableCaseError, match="patient ``"):
        read(HEAD + f"1,a.nii,{word},Clear.\n")


def test_rows_are_counted_as_the_file_counts_them(read):
    table, bad = read(HEAD + ",,,\n" + ROWS + ",,,\n,b.nii,p4,x\n")
    assert list(bad) == ["row 6"]


@pytest.mark.parametrize("name", ["report", "case", "patient"])
def test_two_columns_of_one_name(name, read):
    rows = "1,a.nii,p1,Clear.,x\n"
    with pytest.raises(ValueError, match=f"two columns are named `{name}`"):
        read(HEAD.replace("\n", f",{name}\n") + rows)
    with pytest.raises(ValueError, match="two columns are named `Report` and `REPORT`"):
        read("case,image,patient,Report,REPORT\n" + rows)
    assert len(read(HEAD.replace("\n", ",note,note\n") + "1,a.nii,p1,Clear.,x,y\n")[0]) == 1


def with_column(name, values=("0", "1")) -> str:
    return HEAD.replace("\n", f",{name}\n") + "1,a.nii,p1,Clear.,{}\n2,b.nii,p2,x,{}\n".format(
        *values
    )


@pytest.mark.parametrize(
    "column, label",
    [
        ("emphysema", "Emphysema"),
        ("Pleural_Effusion", "Pleural effusion"),
        ("LUNG NODULES", "Lung nodule"),
        ("label:Hiatal hernia", "Hiatal hernia"),
        ("pericardialEffusion", "Pericardial effusion"),
    ],
)
def test_a_label_spelled_otherwise_is_read_and_said(column, label, read, capsys):
    table, bad = read(with_column(column))
    assert table[f"label:{label}"].tolist() == [0, 1] and not bad
    assert f"column `{column}` is read as `{label}`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "column, values, label",
    [
        ("emphysema", ("none", "severe"), "Emphysema"),
        ("Emphysem", ("0", "1"), "Emphysema"),
        ("Hiatus hernia", ("0", "1"), "Hiatal hernia"),
        ("Broncheictasis", ("0", "1"), "Bronchiectasis"),
    ],
)
def test_a_label_that_is_not_used_is_named(column, values, label, read, capsys):
    table, bad = read(with_column(column, values))
    assert f"label:{label}" not in table and not bad
    said = capsys.readouterr().err
    assert f"column `{column}` is not used" in said and label in said


def test_decimal_comma_of_a_number_of_days(read):
    text = "case;image;patient;report;time_days;event\n1;a.nii;p1;Clear.;12,5;1\n"
    assert read(text)[0].time_days.tolist() == [12.5]
    with pytest.raises(NoUsableCaseError, match="time_days"):
        read(text.replace("12,5", "1,234"))
