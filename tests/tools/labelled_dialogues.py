"""Generated dialogues in which it is known what must not be lost."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

# What a user says that must be kept exactly: rules, names, numbers, settings and the like. {n} is a
# number, {name} a name, {word} a word without meaning.
KEY_ITEMS = {
    "en": (
        "From now on, end every answer with the word {word}.",
        "Please reply in upper case only.",
        "Never mention {name} in your answers.",
        "You must always use metric units.",
        "I'd like you to call me {name}.",
        "My name is {name}, by the way.",
        "Don't use any emojis.",
        "Keep each reply under {n} words.",
        "The pass key is {n}.",
        "I am allergic to peanuts.",
        "Our budget is {n} euros.",
        "Answer in German, whatever language I write in.",
        "My dog is called {name}.",
        "Remember this: the vault is behind the painting.",
        "The meeting with {name} is on Thursday at noon.",
        "Whenever I say 'stop', just answer '{word}'.",
        "temperature: {n}",
        "max_tokens = {n}",
        "See https://example.org/{word}?id={n} for the details.",
        "The file is called {word}.csv and lies in /srv/data/{word}.",
        "Use exactly three bullet points per answer.",
        "You are not allowed to apologise.",
        "The code word is {word}.",
        "Write to {word}@example.org if it fails.",
        "I prefer short answers.",
    ),
    "de": (
        "Ab jetzt endet jede Antwort mit dem Wort {word}.",
        "Antworte bitte nur in Großbuchstaben.",
        "Erwähne niemals {name}.",
        "Du musst immer metrische Einheiten verwenden.",
        "Nenn mich bitte {name}.",
        "Ich heiße übrigens {name}.",
        "Benutze keine Emojis.",
        "Das Passwort ist {word}.",
        "Unser Budget beträgt {n} Euro.",
        "Ich bin gegen Nüsse allergisch.",
        "Merk dir: Der Schlüssel liegt unter der Matte.",
        "Höchstens zwei Sätze pro Antwort.",
        "Das Treffen ist am Donnerstag um {n} Uhr.",
        "Mein Hund wird {name} genannt.",
    ),
    "fr": (
        "À partir de maintenant, termine chaque réponse par le mot {word}.",
        "Réponds toujours en majuscules.",
        "Ne mentionne jamais {name}.",
        "Je m'appelle {name}, au fait.",
        "Tu dois utiliser le système métrique.",
        "N'utilise pas d'émojis.",
        "Le mot de passe est {word}.",
        "Notre budget est de {n} euros.",
        "Souviens-toi : la clé est sous le tapis.",
        "Je suis allergique aux noix.",
        "La réunion est jeudi à midi.",
    ),
    "es": (
        "A partir de ahora, termina cada respuesta con la palabra {word}.",
        "Responde siempre en mayúsculas.",
        "Nunca menciones a {name}.",
        "Me llamo {name}, por cierto.",
        "Debes usar el sistema métrico.",
        "No uses emojis.",
        "La contraseña es {word}.",
        "Nuestro presupuesto es de {n} euros.",
        "Recuerda: la llave está debajo de la alfombra.",
        "Soy alérgico a las nueces.",
        "La reunión es el jueves al mediodía.",
    ),
    "zh": (
        "从现在开始，每个回答都以“{word}”结尾。",  # noqa: RUF001
        "请只用中文回答。",
        "不要提到{name}。",
        "我叫{name}。",
        "你必须使用公制单位。",
        "密码是{word}。",
        "我们的预算是{n}欧元。",
        "记住：钥匙在垫子下面。",  # noqa: RUF001
        "我对花生过敏。",
        "会议在星期四下午三点。",
        "回答时别用表情符号。",
        "我住在{word}街。",
    ),
}
CODE_ITEMS = (
    "```python\ndef {word}(x):\n    return x + {n}\n```",
    "```\nset -e\nmake {word}\n```",
)
# What an assistant says that may be asked for later.
IMPORTANT_ITEMS = (
    "The train leaves at {n}:15 from platform 7.",
    "You will find it at https://example.org/{word}.",
    'The song is called "{word}".',
    "Your order number is {n}.",
)
# What nobody will miss.
CHAT = {
    "en": (
        "I was just thinking about the sea.",
        "It has been raining here since the morning.",
        "That sounds lovely, thank you so much!",
        "The garden looks quiet and a little grey.",
        "How are you feeling about all of this?",
        "My sister says hello.",
        "I had coffee with an old friend and we talked about school.",
        "What a strange and wonderful day it was.",
        "Do you like music?",
        "It is nice to sit by the window and watch people pass.",
    ),
    "de": (
        "Hier regnet es schon seit heute Morgen.",
        "Das klingt wirklich schön, vielen Dank!",
        "Wie geht es dir eigentlich damit?",
        "Der Garten sieht ruhig und etwas grau aus.",
        "Ich habe mit einer alten Freundin Kaffee getrunken.",
        "Magst du Musik?",
    ),
    "fr": (
        "Il pleut ici depuis ce matin.",
        "C'est vraiment joli, merci beaucoup !",
        "Comment vas-tu avec tout cela ?",
        "Le jardin est calme et un peu gris.",
        "J'ai pris un café avec une vieille amie.",
    ),
    "es": (
        "Aquí llueve desde la mañana.",
        "¡Qué bonito suena, muchas gracias!",
        "¿Cómo te sientes con todo esto?",
        "El jardín está tranquilo y un poco gris.",
        "He tomado un café con una vieja amiga.",
    ),
    "zh": (
        "这里从早上就在下雨。",
        "听起来真好，谢谢你！",  # noqa: RUF001
        "花园很安静，有点灰。",  # noqa: RUF001
        "你喜欢音乐吗？",  # noqa: RUF001
        "我和老朋友喝了咖啡。",
    ),
}
_NAMES = ("Anna", "Miguel", "Zoë", "Okonkwo", "Li Wei", "Björn")
_WORDS = ("falcon", "zephyr", "quartz", "mbolo", "linden", "orchid")


@dataclass(frozen=True)
class Label:
    """Text of a message that must not be kept worse than in a tier."""

    message_index: int
    begin: int  # in the message's text
    text: str
    tier: str


@dataclass
class LabelledDialogue:
    """Messages, and what in them must be kept."""

    messages: list[dict[str, object]] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


def make_dialogue(seed: int, n_turns: int = 30, chat_share: float = 0.8) -> LabelledDialogue:
    """Makes a dialogue of turns of a user and an assistant.

    Args:
        seed: Equal seeds make equal dialogues.
        n_turns: A question and an answer each.
        chat_share: Of the pieces that a message is made of, the share that nobody will miss.
    """
    rng = random.Random(seed)
    dialogue = LabelledDialogue()
    if rng.random() < 0.5:
        dialogue.messages.append({"role": "system", "content": "You are a friendly companion."})
    for _ in range(n_turns):
        language = rng.choice(list(KEY_ITEMS))
        keys = [*KEY_ITEMS[language], *CODE_ITEMS]
        _add_message(dialogue, rng, "user", (1, 5), (keys, "key"), language, chat_share)
        facts = list(IMPORTANT_ITEMS)
        _add_message(
            dialogue, rng, "assistant", (4, 14), (facts, "important"), language, chat_share
        )
    return dialogue


def _add_message(
    dialogue: LabelledDialogue,
    rng: random.Random,
    role: str,
    n_pieces: tuple[int, int],
    items: tuple[list[str], str],
    language: str,
    chat_share: float,
) -> None:
    text = ""
    for i in range(rng.randint(*n_pieces)):
        choices, tier = items
        is_chat = rng.random() < chat_share
        piece = rng.choice(CHAT[language] if is_chat else choices)
        piece = piece.format(
            n=rng.randint(2, 99999), name=rng.choice(_NAMES), word=rng.choice(_WORDS)
        )
        # Code and settings have lines of their own.
        if i:
            is_line = piece.startswith("```") or piece[-1] not in ".!?。？！"  # noqa: RUF001
            text += "\n" if is_line or text[-1] not in ".!?。？！ " else rng.choice(" \n")  # noqa: RUF001
        if not is_chat:
            dialogue.labels.append(Label(len(dialogue.messages), len(text), piece, tier))
        text += piece
    dialogue.messages.append({"role": role, "content": text})
