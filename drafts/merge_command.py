%% md
Other parts of the book stand on this one, so it does not import them at its top. `merge` (chapter 44) is imported by name when somebody merges.
%% code
#| export
@app.command("merge", epilog="Example:  distillbook merge ties.yml runs/merged")
def merge_command(
    config: Annotated[Path, typer.Argument(help="A configuration in mergekit's YAML.")],
    out: Annotated[Path | None, typer.Argument(help="The new model's folder.  [default: runs/merged/NAME of the configuration]")] = None,
    seed: Annotated[int, typer.Option(help="Of random drops.")] = 0,
):
    "Merge model folders from disk; the last line printed is the new model's folder."
    from distillbook.lab.settings import project_root
    out = out or project_root()/"runs"/"merged"/config.stem
    with _usage():
        disk = importlib.import_module("distillbook.merge.disk")
        try: print(disk.merge_folders(disk.read_merge_config(config), out, seed=seed), file=sys.stderr)
        except KeyboardInterrupt: complain("stopped; nothing was written"); raise typer.Exit(130) from None
    print(out, flush=True)
