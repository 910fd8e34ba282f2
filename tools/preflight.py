"""Check the nodes of a run before it starts: `python tools/launch.py tools/preflight.py CONFIG.yaml [section.key=value ...]`.

Under tools/launch.py, torchrun, mpirun or srun, as tools/pretrain.py, which does the same by itself before its first step.
Exit codes: 0 ready; 75 stopped by a signal; 78 not ready, or a wrong command line or configuration.
"""

from megatron_hybrid.launch import stop_signals


def main() -> None:
    stop_signals.watch()  # before the imports that take time
    from megatron_hybrid.base.errors import no_traceback
    from megatron_hybrid.config.command_line import RunCommandLine
    from megatron_hybrid.config.load import load_run
    from megatron_hybrid.convert.architecture import architecture_of
    from megatron_hybrid.launch.environment import Launch

    arguments = RunCommandLine(__doc__).parse()
    with no_traceback():
        launch = Launch.from_environment().export()
        config = load_run(arguments.config, arguments.overrides, architecture_of)
        from megatron_hybrid.train.start_checks import preflight_alone  # torch only once the config is right

        preflight_alone(config, launch)


if __name__ == "__main__":
    main()
