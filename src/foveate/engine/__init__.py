"""The machinery between methods and models: binding, the order of calls in a forward, sealing, apply and undo."""
