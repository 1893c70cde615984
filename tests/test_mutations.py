"""The mutations of ``mutations.py`` still find their code. Their trial takes minutes and is a separate command."""

from tests.mutations import MUTATIONS, check_sources


def test_every_mutation_has_its_place_in_the_code() -> None:
    check_sources(MUTATIONS)
    assert len({(m.file, m.source, m.mutant) for m in MUTATIONS}) == len(MUTATIONS)
    assert all(m.source != m.mutant for m in MUTATIONS)
