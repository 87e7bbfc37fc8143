"""The tuner: what may be chosen, what was found, and how it is found. Knows no kernel, no operator and no family.

What may be chosen     config      a config, a kernel's declared space of them (`Tunable`), the registry of kernels
                       device      what is known of each GPU
                       cost        the model that ranks configs where nothing was measured
What was found         store       files of tuned configs; schema: what an entry may hold; log: warnings, once each
                       resolve     the config of one call: an entry, the nearest entry, or the model's choice
                       variables   the environment variables, each with the values that it takes
What is tuned          workload    case, operator, kernel of a case, family; families register themselves
One trial              bench       one kernel of one case, made ready: check a config, then time it
                       check       is a result as good as torch's own?
                       timer       time on the device and on the host
                       static_profile   what the compiler made of a config; compilers: processes that compile
The search             search      which configs are tried, when that is enough, and who wins
                       tune        ``tritune tune``; tune_worker: the process that runs its trials
                       rank        ``tritune tune --static``: a ranking for a GPU that is not here
For every command      child, paths, progress, environment
"""
