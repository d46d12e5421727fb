"""Tables for the terminal that lose no number where it is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column of a `StackedTable`."""

    heading: str  # lines
    cells: Sequence[str]  # one per row; "-" = nothing
    style: str = ""


@dataclass(frozen=True)
class StackedTable:
    """A table that goes on below, its first column repeated, where a terminal is too narrow for all columns: no number is cut.

    Parts leave out the rows that have nothing in them.
    """

    title: str
    first: Column  # names of the rows
    columns: Sequence[Column]
    row_styles: Sequence[str] = ()  # one per row
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields title, parts and caption."""
        for_ascii = str.maketrans({"\N{DAGGER}": "+"}) if options.ascii_only else {}
        yield Text(self.title, style="italic")
        left = list(self.columns)
        while left:
            number = len(left)
            while number > 1 and self._width(console, options, left[:number]) > options.max_width:
                number -= 1
            yield self._part(left[:number], options, for_ascii)
            left = left[number:]
        yield Text(self.caption.translate(for_ascii), style="dim italic")

    def _width(self, console: Console, options: ConsoleOptions, columns: Sequence[Column]) -> int:
        return console.measure(self._part(columns, options, {}), options=options.update(max_width=10_000)).maximum

    def _part(self, columns: Sequence[Column], options: ConsoleOptions, for_ascii: dict[int, str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        table.add_column(self.first.heading, overflow="fold", max_width=max(options.max_width // 2, 8))
        for column in columns:
            table.add_column(column.heading.translate(for_ascii), justify="right", style=column.style, no_wrap=True)
        for row, name in enumerate(self.first.cells):
            cells = [column.cells[row] for column in columns]
            if len(columns) == len(self.columns) or any(cell not in ("", "-") for cell in cells):
                table.add_row(name, *cells, style=self.row_styles[row] if self.row_styles else "")
        return table
