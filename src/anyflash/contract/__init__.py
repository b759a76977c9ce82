"""L7: what every backend must do, as cases and one runner.

`cases` and `table` say what is run, `generate` draws more from a seed, `build` lays the operands in poisoned
memory, `plain` is an attention of its own written with numpy (independent of the semantics' expressions,
masks and reference), `criteria` computes how far a result may be from it, `run` puts a case and a backend
together, `exact` tests masks with integers and no tolerance.
"""
