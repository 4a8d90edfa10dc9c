"Run the notebooks named on standard input, a line `notebook<TAB>log` each, every one in a fork of this process, which has imported what is slow to import."
import json, os, signal, sys, traceback
import peft, trl.trainer.sft_trainer, distillbook.lab.training, distillbook.distill.losses   # noqa: F401  what most notebooks would spend ten seconds on
from IPython.core.interactiveshell import InteractiveShell

def solve(path, log):
    "Run every code cell of a notebook in order; 0, or 1 with the error in the log."
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1); os.dup2(1, 2); os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(900)
    shell = InteractiveShell.instance(colors="NoColor")
    for number, cell in enumerate(json.load(open(path, encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code": continue
        done = shell.run_cell("".join(cell["source"]))
        if not done.success:
            print(f"cell {number} of {path} failed", file=sys.stderr)
            return 1
    return 0

if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)      # cells print to the log; only answers go to the parent
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try: code = solve(*line.rstrip("\n").split("\t"))
            except BaseException: traceback.print_exc(); code = 1
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
