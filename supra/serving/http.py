"""`supra serve`: `transformers serve` with a converted model."""

import sys

from supra.errors import UserError


def serve(model: str, options: list[str]) -> None:
    """Serve a checkpoint over HTTP, with `options` of transformers serve.

    That looks the architecture of config.json up in the module `transformers`, and finds none that
    is not transformers' own. So the class is put there.
    """
    if model.startswith("-"):
        raise UserError(f"supra serve needs a model before {model}: supra serve MODEL --port 8000")
    from supra.checkpoint.opening import find_checkpoint
    from supra.model import modeling

    try:
        from transformers.cli.serving import model_manager
        from transformers.cli.transformers import main
    except ImportError as error:
        raise UserError(f"supra serve: {error}: pip install 'transformers[serving]'") from error
    checkpoint = find_checkpoint(model)
    checkpoint.check_weights()  # transformers would fall back to pickled weights
    for name in checkpoint.config().architectures:
        if name.startswith("Supra"):
            # its own reference: sys.modules may hold another copy of transformers by now
            setattr(model_manager.transformers, name, getattr(modeling, name))
    sys.argv = ["transformers", "serve", model, *options]
    main()
