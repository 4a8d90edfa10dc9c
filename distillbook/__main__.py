"Run the command line as `python -m distillbook`."
from distillbook.lab.cli import app

app(prog_name="distillbook")
