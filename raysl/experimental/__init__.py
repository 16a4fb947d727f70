"""Objectives whose use is not shown yet, one file each, found by their name like those in `raysl.objectives`.

An objective stands here as long as `results/` has no run of it that is better by kNN than the untrained backbone. It
meets the same contract and is tested against the equations of its paper. But it may change between versions, so that
its runs cannot be resumed, or be removed. `raysl pretrain` and `raysl methods` say so. An objective moves to
`raysl/objectives` when a run shows its use; no name, flag or saved key changes with it.
"""
