"""Planner: predicts memory and step time of every legal layout of a run, without torch, so that it runs on a laptop.

plan            a model and its batch under one layout
parameters      parameters of a rank;  state: bytes of weights, gradients and optimizer state, exact
layer_wise      buffers in which every matrix is whole on one rank
activations     activation memory of a layer, from the operations of mixers/*/costs.py and block_costs
memory          peak memory by part: `expected(config, world_size).line()` is what the trainer prints
hardware        measured rates of a GPU and its network (gpus/*.yaml);  points: rates from measured points
layer_time      time of a layer by part, from the work of mixers/*/costs.py and block_costs;  network: time of collectives
optimizer_time  time of the optimizer's update
timing          time of a step by part;  parts: those parts;  schedule: the pipeline, event by event
job, layouts, search    a job, its layouts, and their ranking;  splits: layers of each pipeline rank
measure, calibration, calibration_file, fit     measured steps, their file, and the factors and rates fitted to them
command, emit, query, report, plot      megatron-hybrid plan
"""
