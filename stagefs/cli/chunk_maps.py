"""The bar that shows which chunks of an entry are cached.  Pure."""

from stagefs.cache.inspect import EntryDetail

MAP_COLUMNS = 64
# How much of a column of the chunk map is here: nothing, a part, all.
MAP_NOTHING, MAP_PART, MAP_ALL = ".+#"


def chunk_map(detail: EntryDetail, columns: int = MAP_COLUMNS) -> str:
    """The object from its start to its end, each column a share of it: ``#`` is all there,
    ``+`` partly, ``.`` not at all."""
    columns = min(columns, detail.chunk_count)
    here = [0] * columns
    for first, count in detail.present:
        for column in range(
            first * columns // detail.chunk_count,
            ((first + count) * columns - 1) // detail.chunk_count + 1,
        ):
            start, stop = _column_span(column, columns, detail.chunk_count)
            here[column] += max(0, min(stop, first + count) - max(start, first))
    drawn = []
    for column, count in enumerate(here):
        start, stop = _column_span(column, columns, detail.chunk_count)
        full = count == stop - start
        drawn.append(MAP_ALL if full else MAP_PART if count else MAP_NOTHING)
    return "".join(drawn)


def _column_span(column: int, columns: int, chunk_count: int) -> tuple[int, int]:
    """The chunks of a column; together they are all chunks, each once."""
    return -(-column * chunk_count // columns), -(-(column + 1) * chunk_count // columns)
