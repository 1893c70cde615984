"""The mutations of ``mutations.py`` change what is there; trying them takes minutes, and is done by its command."""

from tests.mutations import MUTATIONS, check_sources


def test_every_mutation_has_its_place_in_the_code() -> None:
    check_sources(MUTATIONS)
    assert len({(m.file, m.source, m.mutant) for m in MUTATIONS}) == len(MUTATIONS)
    assert all(m.source != m.mutant for m in MUTATIONS)
