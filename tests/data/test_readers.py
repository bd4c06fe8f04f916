import datetime

import numpy as np
import polars as pl
import pytest

from saerec_fast.data import Dataset, describe, read_dataset, split_users, synthetic_dataset

# Users and items as they first appear; equal times keep the order of the source; item 7 has no attribute.
ROWS = [
    (20, 5, 4, 1000),
    (10, 7, 3, 1005),
    (20, 6, 5, 900),
    (10, 5, 1, 1005),
    (20, 7, 2, 1000),
]
ITEMS = [
    (7, "Matrix, The (1999)", []),
    (5, "Café: a 'Story' (1995)", ["Drama", "Children's"]),
    (9, "Never Seen (1990)", ["Western"]),
    (6, "Toy Story (1995)", ["Drama"]),
]
SEQUENCES = {"20": [6, 5, 7], "10": [7, 5]}
TIMES = {"20": [900, 1000, 1000], "10": [1005, 1005]}
GENRES = ["unknown", "Children's", "Drama", "Western"]


def check(data, times=TIMES, titles=True, attributes=True):
    assert data.user_ids.tolist() == ["20", "10"]
    found = {str(user): data.item_table.ids[data.sequence(index)] for index, user in enumerate(data.user_ids)}
    assert {user: items.astype(int).tolist() for user, items in found.items()} == SEQUENCES
    if times is None:
        assert data.timestamps is None
    else:
        assert data.timestamps.tolist() == [*times["20"], *times["10"]]
    table = data.item_table
    if titles:
        assert table.ids.tolist() == ["7", "5", "6"]
        assert table.titles == ["Matrix, The (1999)", "Café: a 'Story' (1995)", "Toy Story (1995)"]
    if attributes:
        assert table.attribute_names == ["Children's", "Drama"]
        assert table.attributes.tolist() == [[False, False], [True, True], [False, True]]


def write_movies_dat(folder, encoding="latin-1"):
    lines = [f"{item}::{title}::{'|'.join(genres) or '(no genres listed)'}\n" for item, title, genres in ITEMS]
    (folder / "movies.dat").write_text("".join(lines), encoding=encoding)


def write_dat(folder, encoding="latin-1"):
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ROWS))
    write_movies_dat(folder, encoding)


def quoted(text):
    return f'"{text}"' if "," in text else text


def write_csv(folder):
    lines = ["userId,movieId,rating,timestamp\n", *(f"{u},{i},{r}.5,{t}\n" for u, i, r, t in ROWS)]
    (folder / "ratings.csv").write_text("".join(lines))
    movies = [f"{i},{quoted(title)},{'|'.join(genres) or '(no genres listed)'}\n" for i, title, genres in ITEMS]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(movies), encoding="utf-8")


def write_udata(folder):
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    (folder / "u.genre").write_text("".join(f"{genre}|{index}\n" for index, genre in enumerate(GENRES)) + "\n")
    lines = []
    for item, title, genres in ITEMS:
        flags = [str(int(genre in (genres or ["unknown"]))) for genre in GENRES]
        lines.append("|".join([str(item), title, "01-Jan-1995", "", "http://x", *flags]) + "\n")
    (folder / "u.item").write_text("".join(lines), encoding="latin-1")


def write_recbole(folder):
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\n"]
    lines += [f"{u}\t{i}\t{r}\t{t}.0\n" for u, i, r, t in ROWS]
    (folder / "made.inter").write_text("".join(lines))
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"]
    for item, title, genres in ITEMS:
        bare, year = title[:-7], title[-5:-1]
        lines.append(f"{item}\t{bare}\t{year}\t{' '.join(genres) or 'unknown'}\n")
    (folder / "made.item").write_text("".join(lines), encoding="utf-8")


def write_sequences(folder):
    lines = [f"{user} {' '.join(map(str, items))}\n" for user, items in SEQUENCES.items()]
    (folder / "sequences.txt").write_text("".join(lines))
    write_movies_dat(folder)


def write_table(folder, suffix):
    interactions = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    items = pl.DataFrame(
        {
            "item_id": [item for item, _, _ in ITEMS],
            "title": [title for _, title, _ in ITEMS],
            "genres": [genres if suffix == ".parquet" else "|".join(genres) for _, _, genres in ITEMS],
        }
    )
    for frame, name in ((interactions, "interactions"), (items, "items")):
        path = folder / f"{name}{suffix}"
        if suffix == ".parquet":
            frame.write_parquet(path)
        else:
            frame.write_csv(path, separator="," if suffix == ".csv" else "\t")


FORMATS = {
    "dat": write_dat,
    "dat-utf8": lambda folder: write_dat(folder, "utf-8"),
    "csv": write_csv,
    "udata": write_udata,
    "recbole": write_recbole,
    "table-csv": lambda folder: write_table(folder, ".csv"),
    "table-tsv": lambda folder: write_table(folder, ".tsv"),
    "table-parquet": lambda folder: write_table(folder, ".parquet"),
    "sequences": write_sequences,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_reads_back_equal(tmp_path, kind):
    folder = tmp_path / "outer" / "made"
    folder.mkdir(parents=True)
    FORMATS[kind](folder)
    times = None if kind == "sequences" else TIMES
    data = read_dataset(folder)
    check(data, times)
    assert data.name == "made"
    # Any of: the folder around it, a name, the string of the path.
    (tmp_path / "outer" / "__MACOSX").mkdir()
    nested = read_dataset(str(tmp_path / "outer"))
    check(nested, times)
    assert nested.name == "made"
    assert read_dataset(folder, name="mine").name == "mine"


@pytest.mark.parametrize("kind", FORMATS)
def test_windows_line_ends_and_blank_lines(tmp_path, kind):
    FORMATS[kind](tmp_path)
    for path in tmp_path.iterdir():
        if path.suffix != ".parquet":
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    check(read_dataset(tmp_path), None if kind == "sequences" else TIMES)


def test_a_file_stands_for_its_folder(tmp_path):
    write_dat(tmp_path)
    check(read_dataset(tmp_path / "ratings.dat"))
    write_recbole(tmp_path)
    data = read_dataset(tmp_path / "made.inter")
    check(data)
    assert data.name == "made"


def test_saved_datasets_are_read(tmp_path):
    made = synthetic_dataset(30, 20, 3)
    made.save(tmp_path)
    assert read_dataset(tmp_path).fingerprint() == made.fingerprint()
    assert read_dataset(tmp_path, name="other").name == "other"


@pytest.mark.parametrize(
    "text", ["1::2::3\n", "1::2::3::4::5\n", "x::2::3::4\n", "1::2:3::4::\n", "1:a:2::3::4\n", "::::::\n"]
)
def test_malformed_dat(tmp_path, text):
    write_dat(tmp_path)
    with (tmp_path / "ratings.dat").open("a") as stream:
        stream.write("\n" + text + "1::5::3::4\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 7: "):
        read_dataset(tmp_path)


def test_a_malformed_first_line(tmp_path):
    write_dat(tmp_path)
    (tmp_path / "ratings.dat").write_text("1::2\n3::5::1::1\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, line 1: expected 4 fields separated by '::', got 2: '1::2'"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("text", ["1,2,3\n", "1,2,3,4,5\n", "1,y,3,4\n", "1,2,3,4.5\n", ",,,\n", '"1,2,3,4\n'])
def test_malformed_ratings_csv(tmp_path, text):
    write_csv(tmp_path)
    with (tmp_path / "ratings.csv").open("a") as stream:
        stream.write(text + "1,5,3,4\n")
    with pytest.raises(ValueError, match=r"ratings\.csv, line 7: "):
        read_dataset(tmp_path)


@pytest.mark.parametrize("text", ["1\t2\t3\n", "1\t2\t3\t4\t5\n", "1 2 3 4\n", "1\tz\t3\t4\n"])
def test_malformed_udata(tmp_path, text):
    write_udata(tmp_path)
    with (tmp_path / "u.data").open("a") as stream:
        stream.write(text + "1\t5\t3\t4\n")
    with pytest.raises(ValueError, match=r"u\.data, line 6: "):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "text", ["1,2,3\n", "1,5,3,4,5\n", "1,,3,4\n", "1,5,3,soon\n", ",,,\n", '1,"a,3,4\n', "1,5,3,nan\n", "1,5,3,inf\n"]
)
@pytest.mark.parametrize("blank", ["", "\n\n"])
def test_malformed_table(tmp_path, text, blank):
    write_table(tmp_path, ".csv")
    with (tmp_path / "interactions.csv").open("a") as stream:
        stream.write(blank + text + "1,5,3,4\n")
    # An open quote runs on to the end of the file.
    line = r"(line \d+|after line)" if '"' in text else f"line {7 + len(blank)}: "
    with pytest.raises(ValueError, match=r"interactions\.csv.*" + line):
        read_dataset(tmp_path)


def test_malformed_recbole(tmp_path):
    write_recbole(tmp_path)
    with (tmp_path / "made.inter").open("a") as stream:
        stream.write("1\t5\t3\t\n")
    with pytest.raises(ValueError, match=r"made\.inter, line 7: a user, item or timestamp is missing"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30\n", "at least one item id"),
        ("20 5\n", "user 20 has already appeared in line 1"),
        ("30 5 5x\n", "item '5x' is not in movies.dat"),
    ],
)
def test_malformed_sequences(tmp_path, text, message):
    write_sequences(tmp_path)
    with (tmp_path / "sequences.txt").open("a") as stream:
        stream.write(text)
    with pytest.raises(ValueError, match=rf"sequences\.txt, line 3: .*{message}"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("write", "file", "text", "message"),
    [
        (write_dat, "movies.dat", "4::no genres\n", "line 5: expected id::title::genres"),
        (write_dat, "movies.dat", "5::Twice::Drama\n", "line 5: item 5 has already appeared in line 2"),
        (write_csv, "movies.csv", "4,Comma, The,Drama\n", "line 6: expected 3 fields"),
        (write_udata, "u.item", "4|Title|a|b|c|0|1\n", "line 5: expected id"),
        (write_udata, "u.genre", "Drama\n", r"line 6: expected name\|index"),
        (write_recbole, "made.item", "4\tTitle\n", "line 6: expected 4 fields"),
    ],
)
def test_malformed_items(tmp_path, write, file, text, message):
    write(tmp_path)
    with (tmp_path / file).open("a") as stream:
        stream.write(text)
    with pytest.raises(ValueError, match=rf"{file}, {message}"):
        read_dataset(tmp_path)


def test_missing_columns_name_what_was_looked_for(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("visitor,what,when\n1,2,3\n")
    with pytest.raises(
        ValueError, match=r"no user column; looked for user_id, .*; the columns are visitor, what, when"
    ):
        read_dataset(path)
    with pytest.raises(ValueError, match=r"no column 'who' for the user; the columns are visitor, what, when"):
        read_dataset(path, user_column="who")
    with pytest.raises(ValueError, match="no item column"):
        read_dataset(path, user_column="visitor")
    data = read_dataset(path, user_column="visitor", item_column="what", timestamp_column="when")
    assert data.timestamps.tolist() == [3]
    assert data.name == "log"
    (tmp_path / "ratings.csv").write_text("userId,rating,timestamp\n1,2,3\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n")
    with pytest.raises(ValueError, match=r"ratings\.csv: no item column; looked for movieId"):
        read_dataset(tmp_path)


def test_guessed_names_ignore_case_and_underscores(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("Time\tUser ID\tItemId\n5\ta\tx\n4\ta\ty\n")
    data = read_dataset(path)
    assert data.item_table.ids[data.sequence(0)].tolist() == ["y", "x"]


def test_ids_stay_as_written(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('\ufeffuser,item,time\n007,"a, b",1\n7,ü,2\n', encoding="utf-8")
    data = read_dataset(path)
    assert data.user_ids.tolist() == ["007", "7"]
    assert data.item_table.ids.tolist() == ["a, b", "ü"]
    assert data.item_table.titles == ["a, b", "ü"]
    assert data.item_table.attributes.shape == (2, 0)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_other_separators(tmp_path, separator):
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n1,2,3\n".replace(",", separator))
    assert read_dataset(path).timestamps.tolist() == [3]


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (("12", "7"), (7, 12)),
        (("12.75", "7.5"), (7, 12)),
        (("1e3", "7"), (7, 1000)),
        (("3", "-1.5"), (-2, 3)),
        (("1577836801500", "1577836801400"), (1577836801, 1577836801)),
        (("1577836801500000", "1577836801400000"), (1577836801, 1577836801)),
        (("1577836801500000000", "1577836801400000000"), (1577836801, 1577836801)),
        (("2020-01-01", "2019-12-31"), (1577750400, 1577836800)),
        (("1970-01-01 00:00:02", "1960-01-01"), (-315619200, 2)),
        (("2020-01-01 00:00:01.000002", "2020-01-01 00:00:01.000001"), (1577836801, 1577836801)),
        (("2020-01-01 00:00:02", "2020-01-01 00:00:01"), (1577836801, 1577836802)),
        (("2020-01-01T00:00:02Z", "2020-01-01T00:00:01Z"), (1577836801, 1577836802)),
        (("2020-01-01T02:00:02+02:00", "2020-01-01T02:00:01+02:00"), (1577836801, 1577836802)),
    ],
)
def test_timestamps(tmp_path, texts, seconds):
    """The order is that of the full precision, the values are whole seconds."""
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,time\nu,late,{texts[0]}\nu,early,{texts[1]}\n")
    data = read_dataset(path)
    assert data.item_table.ids[data.items].tolist() == ["early", "late"]
    assert data.timestamps.tolist() == list(seconds)


def test_parquet_types(tmp_path):
    path = tmp_path / "log.parquet"
    utc = datetime.timezone.utc
    frame = pl.DataFrame(
        {
            "user": pl.Series(["b", "b", "a"], dtype=pl.Categorical),
            "item": pl.Series([3, 2, 3], dtype=pl.UInt16),
            "time": [datetime.datetime(2020, 1, 1, 0, 0, second, tzinfo=utc) for second in (2, 1, 0)],
        }
    )
    frame.write_parquet(path)
    data = read_dataset(path)
    assert data.user_ids.tolist() == ["b", "a"]
    assert data.item_table.ids[data.items].tolist() == ["2", "3", "3"]
    assert data.timestamps.tolist() == [1577836801, 1577836802, 1577836800]
    frame.with_columns(time=pl.col("time").dt.date()).write_parquet(path)
    assert read_dataset(path).timestamps.tolist() == [1577836800] * 3
    frame.with_columns(time=pl.Series([2, None, 1])).write_parquet(path)
    with pytest.raises(ValueError, match=r"log\.parquet, row 2: timestamp None"):
        read_dataset(path)
    frame.with_columns(item=pl.Series([2, None, 1])).write_parquet(path)
    with pytest.raises(ValueError, match=r"log\.parquet, row 2: the item id is missing"):
        read_dataset(path)
    frame.with_columns(item=pl.Series([2.5, 1.0, 1.0])).write_parquet(path)
    with pytest.raises(ValueError, match="item ids must be strings or integers, not Float64"):
        read_dataset(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_dataset(path)


def test_attribute_columns_and_separators(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,item\n1,a\n1,b\n")
    table = tmp_path / "things.csv"
    table.write_text("item,label,mood\na,First,sad; slow\nb,,\n")
    data = read_dataset(path, items_path=table, title_column="label", attribute_column="mood", attribute_separator=";")
    assert data.timestamps is None
    assert data.item_table.titles == ["First", "b"]
    assert data.item_table.attribute_names == ["sad", "slow"]
    with pytest.raises(ValueError, match=r"things\.csv: no column 'genre' for the attribute"):
        read_dataset(path, items_path=table, attribute_column="genre")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_dataset(path, items_path=tmp_path / "none.csv")
    table.write_text("item,label\nx,First\n")
    with pytest.raises(ValueError, match=r"none of the item ids \(a, b, \.\.\.\) is in the table of items \(x"):
        read_dataset(path, items_path=table)


def test_items_that_the_table_lacks_go_to_the_end(tmp_path):
    write_table(tmp_path, ".csv")
    with (tmp_path / "interactions.csv").open("a") as stream:
        stream.write("10,new,5,2000\n")
    data = read_dataset(tmp_path)
    assert data.item_table.ids.tolist() == ["7", "5", "6", "new"]
    assert data.item_table.titles[-1] == "new"
    assert not data.item_table.attributes[-1].any()
    assert describe(data)["items_without_attributes"] == 2


def test_recbole_titles_keep_a_year_and_take_no_other(tmp_path):
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\n1\t1\n1\t2\n1\t3\n")
    (tmp_path / "a.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\n1\tLand (1995)\tV\n2\tSea (1996)\t1996\n3\t\t1990\n"
    )
    assert read_dataset(tmp_path).item_table.titles == ["Land (1995)", "Sea (1996)", "3"]


def test_what_cannot_be_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match=r"not a known format; supported are(.|\n)*RecBole(.|\n)*sequences"):
        read_dataset(tmp_path)
    (tmp_path / "log.xyz").write_text("1 2 3")
    with pytest.raises(ValueError, match="not a known format"):
        read_dataset(tmp_path / "log.xyz")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_dat(tmp_path / name)
    with pytest.raises(ValueError, match=r"several data sets in this folder \(one, two\)"):
        read_dataset(tmp_path)
    (tmp_path / "one" / "movies.dat").unlink()
    with pytest.raises(ValueError, match=r"ratings\.dat is here, but movies\.dat is missing"):
        read_dataset(tmp_path / "one")
    write_recbole(tmp_path)
    (tmp_path / "other.inter").write_text("")
    with pytest.raises(ValueError, match=r"several \.inter files"):
        read_dataset(tmp_path)
    with pytest.raises(ValueError, match="empty, expected a header line"):
        read_dataset(tmp_path / "other.inter")
    with pytest.raises(ValueError, match="columns of this format are fixed; leave out user"):
        read_dataset(tmp_path / "two", user_column="user")


@pytest.mark.parametrize("text", ["", "user,item,time\n"])
def test_nothing_in_it(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"empty|no interactions"):
        read_dataset(path)
    write_dat(tmp_path)
    (tmp_path / "ratings.dat").write_text("")
    with pytest.raises(ValueError, match="no interactions"):
        read_dataset(tmp_path / "ratings.dat")


def test_a_larger_file_keeps_every_sequence(tmp_path):
    """Many users, shuffled lines: what polars does in parallel must not mix up users, items or times."""
    made = synthetic_dataset(500, 200, 5, seed=3)
    users = np.repeat(np.arange(made.n_users), made.lengths)
    order = np.random.default_rng(0).permutation(made.n_interactions)
    frame = pl.DataFrame({"userId": users, "movieId": made.items, "rating": 1, "timestamp": made.timestamps})[order]
    frame.write_csv(tmp_path / "ratings.csv")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + "".join(f"{i},I{i},G\n" for i in range(200)))
    data = read_dataset(tmp_path)
    assert data.n_interactions == made.n_interactions
    for index, user in enumerate(data.user_ids.astype(int)):
        assert data.item_table.ids[data.sequence(index)].astype(int).tolist() == made.sequence(user).tolist()
    assert isinstance(data, Dataset)
    assert split_users(data).train.n_users == 300
