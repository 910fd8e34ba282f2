from megatron_hybrid.parallel.quiet import silence_known_warnings

silence_known_warnings()
