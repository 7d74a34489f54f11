"""What a disk may hold after a power cut, at each point of a recorded process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shim import Call

# A folder's contents by relative path: a file's bytes, a link's target, None for a folder.
Tree = tuple[tuple[str, bytes | str | None], ...]


@dataclass(eq=False)
class File:
    """A file: what it contains, and what of that has been fsynced."""

    data: bytes = b""
    durable: bytes = b""

    def possible(self) -> list[bytes]:
        """What it may contain after a power cut: what is durable, all, half, zeros for the rest."""
        kept = self.durable if self.data.startswith(self.durable) else b""
        new = len(self.data) - len(kept)
        return [self.durable, self.data, self.data[: len(kept) + new // 2], kept + bytes(new)]


@dataclass(eq=False)
class Folder:
    """A folder: its entries, and those that are certain to be there after a power cut."""

    entries: "dict[str, Entry]" = field(default_factory=dict)
    durable: "dict[str, Entry]" = field(default_factory=dict)


Entry = File | Folder | str  # the latter is the target of a symbolic link
Change = list[tuple[Folder, str, Entry | None]]  # entries that change at once, and what they become


class Disk:
    """Follows recorded calls on what is in a folder. Only an fsync makes anything durable: of a file, its
    contents; of a folder, its entries."""

    def __init__(self, top: Path, begin: Path) -> None:
        """`begin` holds what was in `top`, durably, before the first call."""
        self._top, self._inodes = str(top), {}
        self.root = read_folder(begin)
        self.pending: list[Change] = []  # changes of entries that are not durable

    def apply(self, call: Call) -> bool:
        """Do what a recorded call did; return whether it may have changed anything."""
        if call.error or call.path.endswith(" (deleted)"):
            return False
        if call.inode and call.name in ("write", "short-write", "fsync", "close"):
            self._notice_rename(call)
        do = getattr(self, "_" + call.name.removeprefix("short-"), None)
        return bool(do and do(call) is not False)

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that a path is in, and its name there."""
        folder, names = self.root, path.removeprefix(self._top).strip("/").split("/")
        for name in names[:-1]:
            folder = folder.entries[name]
        return folder, names[-1]

    def _get(self, path: str) -> Entry | None:
        if path == self._top:
            return self.root
        folder, name = self._find(path)
        return folder.entries.get(name)

    def _change(self, *changes: tuple[Folder, str, Entry | None]) -> None:
        self.pending.append(list(changes))
        assign(list(changes))

    def _notice_rename(self, call: Call) -> None:
        """Catch up with a rename that was not recorded, which only an open file's new path shows."""
        file = self._inodes.get(call.inode)
        folder, name = self._find(call.path)
        old = [each for each, entry in folder.entries.items() if entry is file]
        if old not in ([], [name]):
            self._change((folder, old[0], None), (folder, name, file))

    def _create(self, call: Call) -> None:
        folder, name = self._find(call.path)
        if name not in folder.entries:
            self._change((folder, name, File()))
        self._inodes[call.inode] = folder.entries[name]

    def _empty(self, call: Call) -> None:
        self._create(call)
        self._get(call.path).data = b""

    def _write(self, call: Call) -> None:
        file = self._get(call.path)
        before = file.data.ljust(call.offset, b"\0")
        file.data = before[: call.offset] + call.data + before[call.offset + len(call.data) :]

    def _truncate(self, call: Call) -> None:
        file = self._get(call.path)
        file.data = file.data[: call.offset].ljust(call.offset, b"\0")

    def _mkdir(self, call: Call) -> None:
        self._change((*self._find(call.path), Folder()))

    def _symlink(self, call: Call) -> None:
        self._change((*self._find(call.path), call.other))

    def _unlink(self, call: Call) -> None:
        self._change((*self._find(call.path), None))

    _rmdir = _unlink

    def _rename(self, call: Call) -> None:
        (folder, name), (other, new) = self._find(call.path), self._find(call.other)
        self._change((folder, name, None), (other, new, folder.entries[name]))

    def _fsync(self, call: Call) -> bool:
        entry = self._get(call.path)
        if isinstance(entry, File):
            entry.durable = entry.data
            return False
        certain = [change for change in self.pending if any(folder is entry for folder, _, _ in change)]
        for change in certain:
            self.pending.remove(change)
            assign(change, durable=True)
        return False

    def now(self) -> Tree:
        """What is in the folder now, without a power cut."""
        tree = sorted(walk(self.root, lambda folder: folder.entries))
        return tuple((path, entry.data if isinstance(entry, File) else entry) for path, entry in tree)

    def after_power_cut(self) -> Iterator[Tree]:
        """What may be in it after a power cut now. Of the changes of entries that are not durable, the first
        few may have happened, or all but one, or only one; of files, see `File`, all alike or one apart."""
        for happened in choices(len(self.pending)):
            changed: dict[Folder, Folder] = {}
            for index in happened:
                for folder, name, entry in self.pending[index]:
                    twin = changed.setdefault(folder, Folder(durable=dict(folder.durable)))
                    assign([(twin, name, entry)], durable=True)
            yield from self._with_contents(changed)

    def _with_contents(self, changed: dict[Folder, Folder]) -> Iterator[Tree]:
        tree = sorted(walk(self.root, lambda folder: changed.get(folder, folder).durable))
        files = [entry for _, entry in tree if isinstance(entry, File) and entry.data != entry.durable]
        possible = {file: file.possible() for file in files}
        contents = [{file: possible[file][index] for file in files} for index in range(4)]
        for alike in contents[:2]:
            contents += [{**alike, file: data} for file in files for data in possible[file]]
        for chosen in contents:
            yield tuple(
                (path, chosen.get(entry, entry.data) if isinstance(entry, File) else entry)
                for path, entry in tree
            )


def read_folder(path: Path) -> Folder:
    """A folder that is durable with all that is in it."""
    entries: dict[str, Entry] = {}
    for each in path.iterdir():
        if each.is_symlink():
            entries[each.name] = str(each.readlink())
        elif each.is_dir():
            entries[each.name] = read_folder(each)
        else:
            entries[each.name] = File(each.read_bytes(), each.read_bytes())
    return Folder(entries, dict(entries))


def assign(change: Change, *, durable: bool = False) -> None:
    """Change entries of folders, or those that are certain."""
    for folder, name, entry in change:
        entries = folder.durable if durable else folder.entries
        entries.pop(name, None)
        if entry is not None:
            entries[name] = entry


def walk(
    folder: Folder, entries_of: Callable[[Folder], dict[str, Entry]], path: str = ""
) -> Iterator[tuple[str, File | str | None]]:
    """Everything in a folder, with its path: files, the targets of links, None for a folder."""
    for name, entry in entries_of(folder).items():
        if isinstance(entry, Folder):
            yield path + name, None
            yield from walk(entry, entries_of, f"{path}{name}/")
        else:
            yield path + name, entry


def choices(count: int) -> set[tuple[int, ...]]:
    """Which of a number of changes have happened, in order: the first few, all but one, or only one."""
    every = tuple(range(count))
    firsts = {every[:stop] for stop in range(count + 1)}
    return firsts | {(index,) for index in every} | {every[:index] + every[index + 1 :] for index in every}


def write_tree(tree: Tree, folder: Path) -> None:
    """Write what a tree says into a new folder."""
    folder.mkdir()
    for path, content in tree:
        if content is None:
            (folder / path).mkdir(parents=True)
        elif isinstance(content, bytes):
            (folder / path).write_bytes(content)
        else:
            (folder / path).symlink_to(content)
