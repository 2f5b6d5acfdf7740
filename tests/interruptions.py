"""Interruptions in the middle of work."""


def interrupt_after(monkeypatch, module, function: str, calls: int) -> None:
    """Lets the function of a module, or the method of a class, be called so often; then Ctrl-C comes in its place."""
    original, count = getattr(module, function), 0

    def interrupt(*arguments, **settings):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(module, function, interrupt)
