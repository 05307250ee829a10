"""Words that give away what must be kept, by language.

Phrases are separated by commas; a `*` stands for the rest of a word. English, German, French,
Spanish, Italian, Portuguese and Chinese; text in other scripts counts as unknown (see `signals`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Lexicon: TypeAlias = Mapping[str, str]

# What is so, or must be so, from now on.
RULES: Lexicon = {
    "en": """
        must, mustn't, always, never, from now on, at all times, under no circumstances, you should,
        you shouldn't, you may not, you cannot, you can't, you have to, you need to, need you to,
        want you to, like you to, don't, do not, dont, no longer, make sure, be sure to, ensure,
        whenever, every time, each time, every answer*, each answer*, every reply, each reply,
        every response, each response, all answers, all replies, your answers, your replies,
        your responses, forbidden, not allowed, prohibited, required, requirement*, mandatory,
        prefer*, allergic, allergy, exactly, at most, at least, no more than, no less than,
        no fewer than, not exceed, deadline, until further notice, for the rest of, throughout this,
        unless i, except when, please, every message, each message, any message,
        one question at a time, step by step, has to, have to be, it's fine to, it is fine to,
        it's okay to, feel free to, banned, instead of, your output*, the output, your tone,
        your style, response*, in json, as json, in a table, as a table, bullet points, emoji*,
        upper case, lower case, uppercase, lowercase, in character, in english, in german,
        in french, in spanish, in italian, in portuguese, in chinese, in japanese, in russian,
        english only, german only, french only, spanish only, expect*, short answers, long answers,
        shall, essential, crucial, vital, refrain*, off limits, taboo, confidential, only., only!
    """,
    "de": """
        immer, nie, niemals, stets, muss, musst, müssen, müsst, muß, darf, darfst, dürfen, dürft,
        soll, sollst, sollen, sollt, sollte, solltest, ab jetzt, ab sofort, von nun an,
        von jetzt an, künftig, in zukunft, auf keinen fall, unter keinen umständen, keinesfalls,
        ausschließlich, bitte nicht, bitte kein*, verboten, nicht erlaubt, jede antwort,
        jeder antwort, jedes mal, jedesmal, alle antworten, deine antworten, achte darauf,
        stell sicher, stelle sicher, bevorzug*, am liebsten, allergisch, allergie, genau, höchstens,
        mindestens, maximal, spätestens, frist, erforderlich, bitte, antwort, antworten,
        schritt für schritt, hat zu, stichpunkte*, emoji*, großbuchstaben, kleinbuchstaben, tabelle,
        auf deutsch, auf englisch, auf französisch, auf spanisch, auf italienisch, auf chinesisch,
        statt, anstatt, in der rolle, kurz fassen, es ist wichtig, wichtig, tabu,
        vertraulich, unbedingt
    """,
    "fr": """
        toujours, jamais, dois, doit, devez, doivent, devrais, devrait, désormais, dorénavant,
        à partir de maintenant, en aucun cas, il faut, il ne faut, ne pas, interdit*, obligatoire*,
        chaque réponse, toutes tes réponses, toutes vos réponses, tes réponses, vos réponses,
        chaque fois, assure-toi, assurez-vous, veille à, veillez à, uniquement, exclusivement,
        préfère*, préférer*, allergique*, allergie*, exactement, au plus, au moins, au maximum,
        au minimum, délai, s'il te plaît, s'il vous plaît, réponse, réponses, étape par étape,
        émoji*, emoji*, majuscules, minuscules, en français, en anglais, en allemand, en espagnol,
        en italien, en chinois, tableau, au lieu de, dans le rôle, essentiel*, à personne,
        confidentiel*, tabou, impérati*
    """,
    "es": """
        siempre, nunca, jamás, debes, debe, deben, debéis, deberías, debería, tienes que, tiene que,
        hay que, a partir de ahora, de ahora en adelante, desde ahora, bajo ninguna circunstancia,
        en ningún caso, prohibid*, no está permitido, cada respuesta, todas tus respuestas,
        tus respuestas, cada vez, asegúrate, asegúrese, únicamente, exclusivamente, solamente,
        prefiero, preferencia*, alérgic*, alergia*, exactamente, como máximo, como mínimo, al menos,
        a lo sumo, obligatori*, plazo, por favor, respuesta, respuestas, paso a paso, emoji*,
        mayúsculas, minúsculas, en español, en inglés, en alemán, en francés, en italiano, en chino,
        tabla, en lugar de, en vez de, en el papel, fundamental*, esencial*, a nadie, confidencial*,
        tabú
    """,
    "it": """
        sempre, mai, devi, deve, devono, dovresti, dovrebbe, d'ora in poi, in nessun caso, bisogna,
        vietat*, ogni risposta, tutte le risposte, ogni volta, assicurati, esclusivamente,
        preferisco, allergic*, allergia, esattamente, al massimo, almeno, obbligatori*, scadenza,
        per favore, risposta, risposte, passo dopo passo, emoji, maiuscol*, minuscol*, in italiano,
        in inglese, tabella, invece di, essenziale, a nessuno
    """,
    "pt": """
        sempre, nunca, jamais, deve, devem, deves, deveria, tem que, tens que, a partir de agora,
        de agora em diante, em nenhum caso, proibid*, cada resposta, todas as respostas, cada vez,
        certifique-se, exclusivamente, prefiro, alérgic*, alergia, exatamente, no máximo, no mínimo,
        pelo menos, obrigatóri*, prazo, por favor, resposta, respostas, passo a passo, emoji*,
        maiúscul*, minúscul*, em português, em inglês, tabela, em vez de, essencial, a ninguém
    """,
    "zh": """
        必须, 務必, 务必, 一定要, 不要, 不得, 不准, 不许, 不可以, 禁止, 严禁, 总是, 始终, 永远,
        从不, 从现在起, 从现在开始, 从今以后, 今后, 以后都, 请勿, 切勿, 只能, 只用, 只准, 只许,
        每次, 每个回答, 每条回答, 所有回答, 你的回答, 回答时, 千万, 应当, 你应该, 请别, 别再, 别用,
        别说, 确保, 要求, 过敏, 最多, 最少, 至少, 不超过, 截止, 更喜欢, 一律, 一步一步, 表情符号,
        中文, 英语, 英文, 德语, 法语, 西班牙语, 意大利语, 日语, 表格, 简短, 简洁, 详细, 角色, 语气,
        风格, 格式, 而不是, 字以内
    """,
}

# What says that the rest of the message matters.
ANNOUNCEMENTS: Lexicon = {
    "en": """
        remember, keep in mind, bear in mind, note that, take note, please note, don't forget,
        do not forget, memorise, memorize, the following, as follows, rules, rule, instructions,
        guidelines, constraints, requirements, settings, parameters, from now on
    """,
    "de": """
        merk dir, merke dir, merken sie sich, vergiss nicht, vergessen sie nicht, denk daran,
        denke daran, beachte, beachten sie, folgende*, regel, regeln, anweisung*, vorgabe*,
        einstellungen, parameter, ab jetzt, ab sofort, von nun an
    """,
    "fr": """
        souviens-toi, souvenez-vous, rappelle-toi, rappelez-vous, n'oublie pas, n'oubliez pas,
        retiens, retenez, note que, notez que, suivant*, règle, règles, consigne*, paramètre*,
        désormais, à partir de maintenant
    """,
    "es": """
        recuerda, recuerde, no olvides, no olvide, ten en cuenta, tenga en cuenta, toma nota,
        siguiente*, regla, reglas, instruccion*, instrucción, parámetro*, ajustes,
        a partir de ahora, de ahora en adelante
    """,
    "it": """
        ricorda, ricordati, tieni presente, non dimenticare, seguent*, regola, regole, istruzioni,
        parametri, d'ora in poi
    """,
    "pt": """
        lembre-se, lembra-te, não esqueça, não se esqueça, tenha em mente, seguinte*, regra, regras,
        instruções, parâmetros, a partir de agora
    """,
    "zh": """
        记住, 記住, 记得, 牢记, 别忘, 不要忘, 注意, 以下, 如下, 规则, 规定, 指令, 参数, 设置,
        从现在起, 从现在开始
    """,
}

# Who or what something is.
NAMES: Lexicon = {
    "en": """
        my name, name is, name's, names are, call me, i am called, i'm called, is called,
        are called, named, call it, call her, call him, nickname*, my birthday, born in, born on,
        i live in, i live at, my address, my email, my phone, my number, password, passphrase,
        pass phrase, passcode, pass key, passkey, code word, codeword, username, user name, account,
        word is, words are, code is, number is, key is, key to, secret*, magic, hidden, treasure*,
        buried, opens with, combination
    """,
    "de": """
        heiße, heißt, heißen, mein name, meine namen, name ist, nenn mich, nennen sie mich, namens,
        genannt, spitzname*, geburtstag, geboren, wohne in, ich wohne, meine adresse, passwort,
        kennwort, losung, losungswort, benutzername, konto, telefonnummer, lautet, lauten,
        zauberwort, schlüsselwort, codewort, geheim*, versteckt*, schatz, code ist, wort ist,
        nummer ist
    """,
    "fr": """
        m'appelle, s'appelle, s'appellent, appelle-moi, appelez-moi, mon nom, nommé*, surnom*,
        né en, née en, né le, née le, j'habite, mon adresse, mot de passe, nom d'utilisateur,
        anniversaire, mot est, mot magique, code est, numéro est, secret*, secrète*, caché*, trésor*
    """,
    "es": """
        me llamo, se llama, se llaman, llámame, llámeme, mi nombre, nombre es, llamad*, apodo, nací,
        cumpleaños, vivo en, mi dirección, contraseña, clave, usuario, palabra es, palabra mágica,
        código es, número es, secret*, escondid*, tesoro*
    """,
    "it": """
        mi chiamo, si chiama, si chiamano, chiamami, mio nome, nome è, soprannome, abito in, vivo a,
        indirizzo, compleanno, parola è, parola magica, codice è, numero è, segret*, nascost*,
        tesoro
    """,
    "pt": """
        me chamo, chamo-me, se chama, chama-se, meu nome, nome é, apelido, moro em, endereço, senha,
        aniversário, usuário, palavra é, palavra mágica, código é, número é, segred*, escondid*,
        tesouro
    """,
    "zh": """
        我叫, 名叫, 叫我, 称呼我, 我的名字, 名字是, 名字叫, 姓名, 我姓, 生日, 出生, 我住在, 地址,
        邮箱, 电话, 密码, 口令, 暗号, 用户名, 账号, 词是, 咒语, 魔法, 秘密, 藏在, 宝藏, 代码是,
        号码是, 暗语
    """,
}

# What somebody says of themselves and theirs: not a rule, but not to be invented anew either.
FACTS: Lexicon = {
    "en": """
        i'm a, i'm an, i am a, i am an, i'm the, i am the, i'm vegan, i'm vegetarian, i am vegan,
        i am vegetarian, i work, i live, i study, i own, i have, i've got, i can't, i cannot,
        i don't, i do not, i hate, i love, i like, i want, i need, my * is, my * * is, my * are,
        my * was, my *'s, our * is, our * are, is my, are my, we have, we live, we are, we're,
        i was born, i come from, i'm from, i am from, makes me, make me
    """,
    "de": """
        ich bin, ich arbeite, ich lebe, ich studiere, ich habe, ich kann nicht, ich mag, ich liebe,
        ich hasse, ich will, ich brauche, ich möchte, ich komme aus, mein * ist, meine * ist,
        meine * sind, unser * ist, unsere * ist, ist mein, ist meine, wir haben, wir sind
    """,
    "fr": """
        je suis, je travaille, je vis, j'étudie, j'ai, je ne, j'aime, je déteste, je veux,
        j'ai besoin, je viens de, mon * est, ma * est, mes * sont, notre * est, est mon, est ma,
        nous avons, nous sommes
    """,
    "es": """
        soy, trabajo, vivo, estudio, tengo, no puedo, no me gusta, me gusta, me encanta, odio,
        quiero, necesito, vengo de, mi * es, mis * son, nuestro * es, nuestra * es, es mi, tenemos,
        somos
    """,
    "it": """
        sono, lavoro, vivo, studio, ho, non posso, mi piace, odio, voglio, mio * è, mia * è,
        abbiamo, siamo
    """,
    "pt": """
        sou, trabalho, moro, estudo, tenho, não posso, gosto, odeio, quero, meu * é, minha * é,
        temos, somos
    """,
    "zh": """
        我是, 我在, 我有, 我不, 我喜欢, 我讨厌, 我想, 我要, 我需要, 我吃, 我来自, 我的, 我妻子,
        我丈夫, 我妈, 我爸, 我儿子, 我女儿, 我们有, 我们是, 我们的
    """,
}

# Words that a sentence begins with when it tells the assistant how to go on.
IMPERATIVES: Lexicon = {
    "en": """
        answer, reply, respond, use, write, end, finish, start, begin, speak, talk, call, keep,
        avoid, include, add, append, prefix, format, return, output, give, say, assume, act,
        pretend, treat, stop, translate, list, limit, put, sign, refer, address, mention, cite,
        quote, stick, follow, set, convert, measure, round, count, spell, capitalise, capitalize,
        skip, ignore, refuse, repeat, no, be, stay, remain, explain, describe, wrap, rhyme, think,
        ask, show, go, forget, leave, drop, make, let, take, try, check, compare, find, fix,
        summarise, summarize, help, tell, provide, consider, imagine, play, read, rewrite, rephrase,
        shorten, expand, change, switch, choose, pick, replace, remove, create, generate, draft,
        highlight, bold, number, order, sort, group, calculate, compute, solve, suggest, recommend,
        only, just, nothing, without, all, every, each, any, you are, you're, your, can you,
        could you, would you, will you, let's, hold, mind, refrain, greet
    """,
    "de": """
        antworte, antworten, verwende, verwenden, benutze, benutzen, nutze, schreib*, beende,
        beginne, sprich, sprechen, rede, nenne, nenn, vermeide*, füge, gib, geben, sag, sage, tu,
        halte, halt, übersetze, liste, fasse, setze, rechne, runde, wiederhole, ignoriere,
        formuliere, erwähne, zitiere, kein, keine, sei, seien, bleib*, erklär*, beschreib*, denk*,
        frag*, zeig*, lass, lassen, vergiss, mach*, nimm, versuch*, prüf*, vergleich*, finde, hilf,
        helfen, erzähl*, stell*, duze, sieze, wechsle, ersetze, entferne, erstelle, such*, berechne,
        empfiehl, nur, ohne, nichts, alle, jede, jeder, jedes, du bist, sie sind, kannst du,
        könntest du, können sie, könnten sie, würdest du, dein*, verrate*, verrat
    """,
    "fr": """
        réponds, répondez, utilise*, écris, écrivez, termine*, commence*, parle*, évite*, ajoute*,
        donne*, dis, dites, appelle*, traduis, traduisez, garde*, mets, mettez, répète*, ignore*,
        cite*, n'utilise*, n'écri*, ne, pas de, aucun*, sois, soyez, reste*, explique*, décris,
        décrivez, pense*, demande*, montre*, laisse*, oublie*, fais, faites, prends, prenez,
        essaie*, vérifie*, compare*, trouve*, aide*, raconte*, tutoie*, vouvoie*, change*,
        remplace*, supprime*, crée*, calcule*, seulement, sans, rien, tout, toute*, tous, chaque,
        pas d'*, tu es, vous êtes, peux-tu, pouvez-vous, pourrais-tu, pourriez-vous, ton, ta, tes
    """,
    "es": """
        responde*, contesta*, usa, use, utiliza*, escribe*, termina*, empieza*, comienza*, habla*,
        evita*, añade*, agrega*, da, dame, di, dime, llama*, traduce*, mantén*, pon, repite*,
        ignora*, cita*, no uses, no utilices, no escribas, no digas, no menciones, no respondas,
        no hables, ningún, ninguna, sé, sea, quédate, mantente, explica*, describe*, piensa,
        pregunta*, muestra*, deja*, olvida*, haz, toma, intenta, comprueba, compara, encuentra,
        ayúda*, cuenta*, tutéa*, trátame, cambia*, reemplaza*, elimina*, crea, calcula*, solo, sólo,
        solamente, sin, nada, todo*, toda*, cada, eres, usted es, puedes, puede, podrías, podría,
        tu, tus
    """,
    "it": """
        rispondi, usa, utilizza, scrivi, termina, inizia, parla, evita, aggiungi, dai, traduci,
        mantieni, ripeti, ignora, non, sii, resta, spiega, descrivi, pensa, chiedi, mostra, lascia,
        dimentica, fai, prendi, prova, controlla, confronta, trova, aiuta*, racconta*, cambia, solo,
        senza, niente, tutt*, ogni, sei, puoi, potresti
    """,
    "pt": """
        responda, responde, use, usa, utilize, escreva, escreve, termine, comece, fale, evite,
        adicione, traduza, mantenha, repita, ignore, não, seja, sê, fique, fica, explique, explica,
        descreva, pense, pergunte, mostre, deixe, esqueça, faça, tente, verifique, compare, ajude,
        conte, mude, só, sem, nada, tudo, tod*, cada, você é, tu és, pode, podes, poderia
    """,
    "zh": """
        请, 用, 使用, 回答, 回复, 称, 把, 将, 保持, 避免, 写, 说, 翻译, 列出, 结尾, 开头, 别, 勿,
        不用, 简短, 简洁, 像, 只, 都, 全部, 所有, 没有, 你是, 您是, 扮演, 假装, 解释, 描述, 思考,
        告诉, 帮我, 帮忙, 给我, 忘掉, 忘记, 改成, 你可以, 你能, 能不能, 可以, 保留, 不
    """,
}

# What may stand before an imperative.
SOFTENERS: Lexicon = {
    "en": """
        please, only, just, also, now, then, so, and, but, ok, okay, always, first, finally,
        instead, kindly, let's
    """,
    "de": """
        bitte, nur, auch, jetzt, dann, also, und, aber, zuerst, stattdessen
    """,
    "fr": """
        s'il te plaît, s'il vous plaît, merci de, maintenant, aussi, puis, et, mais
    """,
    "es": """
        por favor, solo, sólo, ahora, también, luego, y, pero, primero
    """,
    "it": """
        per favore, solo, ora, anche, poi, e, ma
    """,
    "pt": """
        por favor, só, agora, também, depois, e, mas
    """,
    "zh": """
        那么, 那, 现在, 另外, 还有, 并, 并且, 而且, 麻烦, 麻烦你, 只, 都
    """,
}

# Turns of phrase with such words that tell nobody to do anything, where they open a sentence.
SAYINGS: Lexicon = {
    "en": """
        there is always, there's always, there was always, there are always, nothing much,
        nothing special, nothing new, nothing happened, just thinking, just wondering, just saying,
        funny thing, strange thing, fun fact, the thing is, guess what, long story short
    """,
    "de": "es gibt immer, es gab immer, nichts besonderes, nichts neues, nicht viel passiert",
    "fr": "il y a toujours, il y avait toujours, rien de spécial, rien de neuf",
    "es": "siempre hay, siempre había, nada especial, nada nuevo",
    "it": "c'è sempre, c'era sempre, niente di speciale, niente di nuovo",
    "pt": "sempre há, há sempre, nada de especial, nada de novo",
    "zh": "总是有, 没什么, 说来好笑",
}

# Numbers and times in words; words that mean something else in one of the languages are left out.
NUMBERS: Lexicon = {
    "en": """
        two, three, four, five, seven, eight, nine, ten, eleven, twelve, *teen, twenty*, thirty*,
        forty*, fifty*, sixty*, seventy*, eighty*, ninety*, hundred*, thousand*, million*, billion*,
        dozen*, percent, noon, midnight, monday*, tuesday*, wednesday*, thursday*, friday*,
        saturday*, sunday*, january, february, april, june, july, august, september, october,
        november, december
    """,
    "de": """
        zwei*, drei*, vier*, fünf*, sechs*, sieben*, neun*, zehn*, zwölf*, *zehn, *zig, *ßig,
        hundert*, tausend*, million*, dutzend, prozent, mittag*, mitternacht, montag*, dienstag*,
        mittwoch*, donnerstag*, freitag*, samstag*, sonnabend*, sonntag*, januar, februar, märz,
        juni, juli, oktober, dezember
    """,
    "fr": """
        deux, trois, quatre, cinq, sept, huit, douze, treize, quatorze, quinze, vingt*, trente*,
        quarante*, cinquante*, soixante*, cent, cents, mille, million*, pour cent, midi, minuit,
        lundi, mardi, mercredi, jeudi, vendredi, samedi, dimanche, janvier, février, avril, juin,
        juillet, août, septembre, octobre, novembre, décembre
    """,
    "es": """
        dos, tres, cuatro, cinco, seis, siete, ocho, nueve, diez, doce, trece, catorce, quince,
        veint*, treinta, cuarenta, cincuenta, sesenta, setenta, ochenta, noventa, cien, ciento, mil,
        millon*, docena*, por ciento, mediodía, medianoche, lunes, martes, miércoles, jueves,
        viernes, sábado*, domingo*, enero, febrero, abril, mayo, junio, julio, septiembre, octubre,
        noviembre, diciembre
    """,
    "it": """
        quattro, cinque, sette, otto, nove, dieci, dodici, venti*, trenta*, quaranta*, cinquanta*,
        cento, per cento, mezzogiorno, mezzanotte, lunedì, martedì, mercoledì, giovedì, venerdì,
        sabato, domenica
    """,
    "pt": """
        dois, duas, três, quatro, sete, oito, dez, doze, vinte, trinta, quarenta, cinquenta, cem,
        meio-dia, meia-noite, segunda-feira, terça-feira, quarta-feira, quinta-feira, sexta-feira
    """,
}
