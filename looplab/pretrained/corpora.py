"""`looped fetch corpus`: a corpus of English prose from Debian packages, to train and test the task text on.

    books          Jane Austen's six novels, Bierce's Devil's Dictionary, An Anarchist FAQ
    manuals        Python, Perl, PostgreSQL, SQLite, Apache, Git
    reference      Webster's of 1913 with its supplements (GCIDE), FOLDOC and the Jargon File on computing
    standards      Debian's policy, its reference and its developers' reference, the GNU coding standards

`apt-get` downloads the packages; they are unpacked and not installed. Code, markup, menus and tables are removed: a
file holds paragraphs of prose, each on one line, with blank lines between them. Every text may be used and passed on:
sources.json has the version, SHA-256 and licence of each package, whose copyright file lies beside its texts.
"""

import gzip
import hashlib
import html.parser
import json
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from data_builders.text import CORPUS
from looplab.runs.writing import whole_folder, write_whole

# Below this many characters a paragraph is a heading, a menu entry or a line of a table.
SHORTEST = 60
# A paragraph of prose has at least this share of letters, spaces and marks of SENTENCE; code and tables have less.
PROSE_SHARE = 0.93
CLOSING = "\"')\u2019\u201d"
SENTENCE = " ,.;:(-\u2018\u201c" + CLOSING
# Articles of GCIDE with fewer characters are lists of derived words. The longer articles are a quarter of its 40 MB.
LONG_ARTICLE = 600


@dataclass(frozen=True)
class Source:
    """A package, and how its texts are read.

    package: regular expression for its name; the highest version is taken. files: glob in the unpacked package.
    read(path): the paragraphs of one file.
    """

    package: str
    genre: str
    licence: str
    files: str
    read: Callable[[Path], Iterator[str]]


def fetch_corpus(output: str | Path | None = None) -> Path:
    """Download, clean and write the corpus, whole or not at all, and return its folder. A corpus that is there stays.

    Args:
        output: folder of the corpus; unless given, the folder in the user's cache that `load_task("text", "corpus")`
            reads.

    Raises:
        ValueError: the folder holds something else, the machine has no `apt-get` or `dpkg-deb`, or its package lists
            lack a package.
    """
    folder = CORPUS if output is None else Path(output)
    there = (folder / "sources.json").is_file
    if there():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} holds something else than the corpus: delete it, or name another folder.")
    missing = [command for command in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(command) is None]
    if missing:
        raise ValueError(
            f"the corpus is made from Debian packages, and there is no {missing[0]} here: name text files of your own "
            "in the recipe's data.files."
        )
    names = package_names()
    with (
        whole_folder(folder, there) as new,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".packages-") as packages,
    ):
        records = []
        for source, name in tqdm(list(zip(SOURCES, names, strict=True)), desc="Fetch", unit="package"):
            records.append(fetch_source(source, name, new / name, Path(packages)))
        text = json.dumps({"sources": records, "bytes": sum(record["bytes"] for record in records)}, indent=2)
        write_whole(new / "sources.json", text + "\n")
    return folder


def describe_corpus(folder: Path) -> str:
    """One line of text: the folder, its megabytes, files and packages."""
    record = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    num_files = sum(source["files"] for source in record["sources"])
    num_packages = len(record["sources"])
    return f"{folder}: {record['bytes'] / 1e6:.1f} MB of text, {num_files:,} files from {num_packages} packages"


def package_names() -> list[str]:
    """The package name of each source; of several versions (postgresql-doc-15, -17) the highest.

    Raises ValueError if apt-get does not know a package.
    """
    known = run("apt-cache", "pkgnames").split()
    names = []
    for source in SOURCES:
        found = [name for name in known if re.fullmatch(source.package, name)]
        if not found:
            raise ValueError(f"apt-get knows no package {source.package}: run `apt-get update` (Debian 12 or later).")
        names.append(max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)]))
    return names


def fetch_source(source: Source, name: str, output: Path, packages: Path) -> dict:
    """Write the texts of one package into `output`, and return its entry for sources.json.

    packages: folder for the download. Raises ValueError if a command fails or the package has no text.
    """
    downloaded, unpacked = packages.resolve() / name / "deb", packages.resolve() / name / "files"
    downloaded.mkdir(parents=True)
    run("apt-get", "download", name, cwd=downloaded)
    (archive,) = downloaded.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), str(unpacked))
    output.mkdir(parents=True)
    shutil.copyfile(unpacked / "usr" / "share" / "doc" / name / "copyright", output / "copyright")
    num_files = num_bytes = 0
    # A link may show the same folder a second time.
    files = sorted(path for path in unpacked.glob(source.files) if path.is_file() and path.resolve() == path)
    for path in files:
        text = "\n\n".join(source.read(path))
        if text:
            place = re.sub(r"\W+", "-", str(path.relative_to(unpacked)).removeprefix("usr/share/")) + ".txt"
            num_bytes += (output / place).write_bytes(f"{text}\n".encode())
            num_files += 1
    if not num_files:
        raise ValueError(f"package {name} has no text in {source.files}: is it of another Debian release?")
    record = {"package": name, "version": run("dpkg-deb", "-f", str(archive), "Version").strip()}
    record |= {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest(), "licence": source.licence}
    shutil.rmtree(packages / name)
    return record | {"genre": source.genre, "files": num_files, "bytes": num_bytes}


def run(*command: str, cwd: Path | None = None) -> str:
    """The standard output of a command. Raises ValueError if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


# Formats


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, which blank lines separate; each on one line."""
    for block in re.split(r"\n[ \t]*\n", text):
        joined = " ".join(block.split())
        if joined:
            yield joined


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is long enough, mostly words, and ends like a sentence; menus, tables and code do not."""
    plain = sum(character.isalpha() or character in SENTENCE for character in paragraph)
    ends = paragraph.rstrip(CLOSING)[-1:] in ".!?:;"
    return len(paragraph) >= SHORTEST and ends and plain / len(paragraph) >= PROSE_SHARE


class Prose(html.parser.HTMLParser):
    """Collects the text of a page, paragraph by paragraph, without listings, tables, scripts and menus."""

    SKIPPED = re.compile("head|script|style|pre|table|nav|header|footer|svg|form|button")
    BLOCKS = re.compile("p|div|li|dd|dt|h[1-6]|blockquote|section|article|[uod]l|body|br|hr")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.skipping = [], []

    def handle_starttag(self, tag, attrs):
        if self.SKIPPED.fullmatch(tag):
            self.skipping.append(tag)
        elif self.BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_endtag(self, tag):
        if tag in self.skipping:
            # An element that was never closed ends with the element around it.
            del self.skipping[self.skipping.index(tag) :]
        if self.BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data.replace("¶", ""))


def read_html(path: Path) -> Iterator[str]:
    """The paragraphs of prose in a web page."""
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    parser = Prose()
    # A blank line in HTML does not end a paragraph.
    parser.feed(re.sub(r"\n\s*\n", "\n", text))
    parser.close()
    return filter(is_prose, paragraphs("".join(parser.parts)))


POD_CODE = re.compile(r"([A-Z])<(?:<+\s((?:(?!>>).)*?)\s>+|([^<>]*))>", re.DOTALL)
POD_ESCAPES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


def plain_pod(text: str) -> str:
    """Text in Perl's documentation format, without its codes B<bold>, L<text|link>, E<gt>; inner codes go first."""

    def plain(code: re.Match) -> str:
        kind, inner = code[1], code[2] if code[2] is not None else code[3]
        if kind == "E":
            # "<" and ">" get a stand-in until the end, since they would be read as the marks of a code.
            return {"lt": "\0", "gt": "\1"}.get(inner, POD_ESCAPES.get(inner, ""))
        return "" if kind in "XZ" else inner.partition("|")[0] if kind == "L" else inner

    changed = 1
    while changed:
        text, changed = POD_CODE.subn(plain, text)
    return text.replace("\0", "<").replace("\1", ">")


def read_pod(path: Path) -> Iterator[str]:
    """The paragraphs of prose in a page of Perl's documentation."""
    # Code is indented, and commands begin with "=".
    blocks = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
    kept = "\n\n".join(block for block in blocks if not re.match(r"\s*=|[ \t]", block.lstrip("\n")))
    return filter(is_prose, paragraphs(plain_pod(kept)))


def read_plain(path: Path) -> Iterator[str]:
    """The paragraphs of prose in a text file, gzipped or not."""
    opened = gzip.open if path.suffix in (".gz", ".dz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        return filter(is_prose, paragraphs(file.read()))


def articles(path: Path) -> Iterator[str]:
    """Articles of a dictd dictionary; a headword begins at the margin, the text of its article is indented."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    # Articles about the dictionary itself begin with 00 or _.
    for article in re.split(r"\n(?=\S)", text):
        if not article.startswith(("00", "_")):
            yield article


def plain_article(article: str) -> str:
    """An article on one line, without braces of cross-references, \\pronunciation\\ and [sources]."""
    article = re.sub(r"\\[^\\\n]*\\", "", article)
    article = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|Webster[^\]]*|[A-Z][^\]]*PJC)\]", "", article)
    return re.sub(r"\s+([,.;:])", r"\1", " ".join(re.sub(r"[{}]", "", article).split()))


def read_gcide(path: Path) -> Iterator[str]:
    """The long articles of GCIDE, a line each."""
    long = (article for article in articles(path) if len(article) >= LONG_ARTICLE)
    return (article for article in map(plain_article, long) if len(article) >= SHORTEST)


def read_dictionary(path: Path) -> Iterator[str]:
    """The articles of a dictd dictionary, a line each."""
    return (article for article in map(plain_article, articles(path)) if len(article) >= SHORTEST)


def read_r_lines(path: Path) -> Iterator[str]:
    """Paragraphs of the character vectors in an R package's data: R's serialization, version 2 or 3, zlib-packed."""
    data, novels = path.read_bytes(), []
    while data:
        packed = zlib.decompressobj()
        vector, data = packed.decompress(data[4:]), packed.unused_data
        novels.append("\n".join(r_strings(vector)))
    return filter(is_prose, paragraphs("\n\n".join(novels)))


def r_strings(vector: bytes) -> Iterator[str]:
    """The strings of a serialized character vector; none for any other R object."""
    (version,) = struct.unpack_from(">i", vector, 2)
    place = 14
    if version == 3:  # version 3 names the encoding here
        place += 4 + struct.unpack_from(">i", vector, place)[0]
    kind, count = struct.unpack_from(">ii", vector, place)
    place += 8
    for _ in range(count if kind & 0xFF == 16 else 0):
        _, length = struct.unpack_from(">ii", vector, place)
        place += 8 + max(length, 0)
        yield vector[place - max(length, 0) : place].decode()


SOURCES = [
    Source("r-cran-janeaustenr", "books", "public domain (package: MIT)", "**/data/Rdata.rdb", read_r_lines),
    Source("dict-devil", "books", "public domain", "usr/share/dictd/*.dict.dz", read_plain),
    Source("anarchism", "books", "GPL-2", "usr/share/doc/anarchism/html/*.html", read_html),
    Source(r"python3\.\d+-doc", "manuals", "PSF-2.0", "usr/share/doc/*/html/**/*.html", read_html),
    Source("perl-doc", "manuals", "GPL-1+ or Artistic", "usr/share/perl/*/pod/*.pod", read_pod),
    Source(r"postgresql-doc-\d+", "manuals", "PostgreSQL", "usr/share/doc/*/html/*.html", read_html),
    Source("sqlite3-doc", "manuals", "public domain", "usr/share/doc/sqlite3/*.html", read_html),
    Source("apache2-doc", "manuals", "Apache-2.0", "usr/share/doc/apache2-doc/manual/en/**/*.html", read_html),
    Source("git-doc", "manuals", "GPL-2", "usr/share/doc/git-doc/**/*.html", read_html),
    Source("dict-gcide", "reference", "GPL-2+", "usr/share/dictd/*.dict.dz", read_gcide),
    Source("dict-foldoc", "reference", "GFDL-1.1+", "usr/share/dictd/*.dict.dz", read_dictionary),
    Source("dict-jargon", "reference", "public domain", "usr/share/dictd/*.dict.dz", read_dictionary),
    Source("debian-policy", "standards", "GPL-2+", "usr/share/doc/debian-policy/**/*.html", read_html),
    Source("debian-reference-en", "standards", "GPL-2+", "usr/share/debian-reference/*.html", read_html),
    Source("developers-reference", "standards", "GPL-2", "usr/share/developers-reference/*.html", read_html),
    Source("gnu-standards", "standards", "GFDL-1.3+", "usr/share/doc/gnu-standards/*.text.gz", read_plain),
]
