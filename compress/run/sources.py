"""What a recipe names, looked at before there is a run: its model and its texts."""

from compress.model.config import read_config
from compress.model.find import commit_of, is_named, resolve_model
from compress.model.headers import weight_files
from compress.model.weights import planned_architecture
from compress.run.recipe import Recipe
from compress.text.sources import require_text


def checked_files(recipe: Recipe) -> Recipe:
    """The recipe, which names the commit of a hub model.

    Raises:
        InputError: the model is none that a search can run, or a text is not there.
    """
    path = resolve_model(recipe.model, recipe.revision, config_only=True)
    config = read_config(path)
    planned_architecture(path, config)
    if commit_of(path) is None:
        weight_files(path, config)  # a snapshot may not have come yet
    for text in (recipe.data, recipe.eval_data):
        if text is not None:
            require_text(text)
    return recipe.changed(revision=commit_of(path)) if is_named(recipe.model) else recipe
