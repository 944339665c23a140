"""`supra serve DIR …`: `transformers serve` with a converted model."""

import sys

from supra.errors import UserError


def serve(arguments: list[str]) -> None:
    """Serve the checkpoint arguments[0] over HTTP; what follows are options of transformers serve.

    That looks the architecture of config.json up in the module `transformers`, and finds none that
    is not transformers' own. So the class is put there.
    """
    if not arguments or arguments[0].startswith("-"):
        raise UserError("supra serve needs a model first: supra serve DIR --port 8000")
    from supra.checkpoint.opening import find_checkpoint
    from supra.model import modeling

    try:
        from transformers.cli.serving import model_manager
        from transformers.cli.transformers import main
    except ImportError as error:
        raise UserError(f"supra serve: {error}: pip install 'transformers[serving]'") from error
    checkpoint = find_checkpoint(arguments[0])
    checkpoint.check_weights()  # transformers would fall back to pickled weights
    for name in checkpoint.config().architectures:
        if name.startswith("Supra"):
            # its own reference: sys.modules may hold another copy of transformers by now
            setattr(model_manager.transformers, name, getattr(modeling, name))
    sys.argv = ["transformers", "serve", *arguments]
    main()
