"""Kernels that have imported already what is slow to import. `warm.py serve SOCKET` waits, and forks a kernel for each request;
`warm.py kernel CONNECTION_FILE` is what Jupyter starts: it asks for a kernel, and lives as long as that one does."""
import ctypes, json, os, select, signal, socket, sys

def fork_kernel(request, sockets):
    "In the child: become the kernel that was asked for; in the parent: its process number."
    child = os.fork()
    if child: return child
    for s in sockets: s.close()                    # a copy held here would keep the others from seeing their end
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: it ends with the process that forked it
    os.setsid(); os.chdir(request["cwd"]); os.environ.clear(); os.environ.update(request["environment"])
    os.environ.pop("JPY_PARENT_PID", None)         # the one who started it is not its parent
    sys.argv = ["kernel", "-f", request["file"]]
    from ipykernel.kernelapp import launch_new_instance
    try: launch_new_instance()
    finally: os._exit(0)

def serve(place):
    import peft, trl.trainer.sft_trainer, matplotlib.pyplot, pandas, IPython, ipykernel.kernelapp   # noqa: F401
    import distillbook.lab.training, distillbook.lab.evaluate, distillbook.lab.corpora              # noqa: F401
    listening, lines, parent = socket.socket(socket.AF_UNIX), {}, os.getppid()
    listening.bind(place); listening.listen()
    print("ready", flush=True)
    while os.getppid() == parent:                  # ends with the tests
        for ready in select.select([listening, *lines], [], [], 0.05)[0]:
            if ready is listening:
                line, _ = listening.accept()
                request = json.loads(line.makefile().readline())
                lines[line] = fork_kernel(request, [listening, line, *lines])
                line.sendall(f"{lines[line]}\n".encode())
            elif ready in lines and not ready.recv(1): os.kill(lines[ready], signal.SIGKILL)      # who asked for it is gone
        for line, pid in list(lines.items()):
            if os.waitpid(pid, os.WNOHANG)[0]: del lines[line]; line.close()

def kernel(file):
    line = socket.socket(socket.AF_UNIX)
    line.connect(os.environ["DISTILLBOOK_WARM"])
    line.sendall((json.dumps(dict(file=file, cwd=os.getcwd(), environment=dict(os.environ))) + "\n").encode())
    answers = line.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda number, frame: os.kill(pid, number))
    answers.readline()                             # nothing comes; it ends when the kernel has ended

if __name__ == "__main__": dict(serve=serve, kernel=kernel)[sys.argv[1]](sys.argv[2])
