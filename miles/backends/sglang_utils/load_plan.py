class LoadPlans:
    def __init__(self, model):
        self._model = model

    def begin(self):
        pass

    def end(self):
        pass

    def load(self, entries, memory):
        self._model.load_weights([(e.name, e.view(memory)) for e in entries])
