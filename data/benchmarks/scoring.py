"Scorers that the task files name."
from distillbook.lab.evaluate import score_choice, score_text
