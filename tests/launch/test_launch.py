"""Parallel groups: made, destroyed, and made again with other degrees by the same ranks."""

from testing import jobs


def test_groups_are_left_for_others(ranks):
    layouts = [dict(tensor_parallel_size=2), dict(pipeline_parallel_size=2), dict(tensor_parallel_size=2)]
    for found in ranks.run(jobs.groups_formed_again, 2, layouts=layouts):
        sums, formed, left = zip(*found)
        assert sums == (2, 1, 2)
        assert formed[2] == formed[0] > 1, "none of the first layout's is left"
        assert left == (1, 1, 1), "all ranks' group alone"
