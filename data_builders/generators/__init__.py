"""Questions that are drawn, graded by how hard they are: the generators of the task `sequence`."""
