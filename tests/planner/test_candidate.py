"""What a candidate is made of."""

from jaxpipe.planner.candidate import Candidate, Mesh


def test_sizes():
    one = Candidate(Mesh(4, 2, 3), "interleaved", 2, 8, 1, "stage", 0)
    assert one.mesh.size == 24 and one.num_stages == 8 and one.keeps == "layer"
    assert one._replace(remat="dots").keeps == "dots"
