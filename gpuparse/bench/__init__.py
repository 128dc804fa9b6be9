"""`gpuparse bench`: gpuparse beside other ways to feed the same training, on the same machine in the same run.

`run` takes the parts in turn, `contest` lets sides in processes of their own take turns, `peers` are the sides,
`baselines` hold the reference's method written anew. Imported only when the command runs.
"""
