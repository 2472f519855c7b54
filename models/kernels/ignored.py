"""Labels and ids that say "nothing here", for who makes data and who learns from it. Does not import torch."""

IGNORE = -100  # label of a position where nothing is learned
UNSCORED = -1  # teacher id of a position of which the teacher says nothing
