"""Songs as timed MIDI events: read from a WAD archive, divided into stems, cut to an excerpt, written back.

Nothing here makes sound; render_musdb.py does. General MIDI tells the stems apart: channel 10 is the drum kit,
programs 33-40 are basses and 53-55 voices (counted from 1 as the standard does; the code counts from 0).
"""

import io
import struct
from dataclasses import dataclass, replace

import mido

STEMS = ("vocals", "drums", "bass", "other")

# Owner of the notes that are taken out of "other" and sung; see lead_channel
LEAD = "lead"

DRUM_CHANNEL = 9
BASS_PROGRAMS = range(32, 40)
VOICE_PROGRAMS = range(52, 55)

# A singer's range, A3 to E5, and its middle
LOWEST_SUNG, MIDDLE_SUNG, HIGHEST_SUNG = 57, 66, 76


@dataclass(frozen=True)
class Event:
    """One MIDI channel message at its time from the start of the song."""

    seconds: float
    message: mido.Message


@dataclass(frozen=True)
class Note:
    """One note with its start and end in seconds, and the channel and stem (or LEAD) that it belongs to."""

    start: float
    end: float
    pitch: int
    velocity: int
    channel: int
    stem: str


def wad_songs(paths):
    """Returns {name: MIDI file bytes} of the songs in WAD archives, each song under the first name it has there.

    A WAD is a header (magic, number of lumps, offset of the directory), the lumps, and a directory of
    (offset, size, name). Music lumps are named D_<SONG>; those that hold standard MIDI begin with "MThd".
    """
    songs = {}
    for path in paths:
        with open(path, "rb") as file:
            data = file.read()
        magic, count, directory = struct.unpack_from("<4sii", data)
        if magic not in (b"IWAD", b"PWAD"):
            raise ValueError(f"{path} begins with {magic!r}, expected a WAD archive (IWAD or PWAD)")
        for entry in range(count):
            offset, size, raw_name = struct.unpack_from("<ii8s", data, directory + 16 * entry)
            name = raw_name.rstrip(b"\0").decode("ascii", "replace").lower()
            lump = data[offset : offset + size]
            # One song under two names could be in train and test
            if name.startswith("d_") and lump.startswith(b"MThd") and lump not in songs.values():
                songs.setdefault(name.removeprefix("d_"), lump)
    return songs


def read_events(midi):
    """Returns the channel messages of a MIDI file (bytes) as a list of Event, all tracks merged."""
    events, seconds = [], 0.0
    for message in mido.MidiFile(file=io.BytesIO(midi), clip=True):
        seconds += message.time  # mido has turned ticks into seconds with the file's tempo changes
        if hasattr(message, "channel"):
            events.append(Event(seconds, message))
    return events


def is_note(message):
    """True for note_on and note_off."""
    return message.type in ("note_on", "note_off")


def starts_note(message):
    """True for a note_on that sounds: velocity 0 means note_off."""
    return message.type == "note_on" and message.velocity > 0


def assign_stems(events, lead=None):
    """Returns the stem of every event, None for events that are no notes.

    A note belongs to the stem of the program its channel had when the note began. Notes of the channel `lead` that
    would be in "other" get LEAD.
    """
    programs, sounding, stems = [0] * 16, {}, []
    for event in events:
        message, stem = event.message, None
        if message.type == "program_change":
            programs[message.channel] = message.program
        elif starts_note(message):
            stem = _stem_of(message.channel, programs[message.channel])
            if message.channel == lead and stem == "other":
                stem = LEAD
            sounding[message.channel, message.note] = stem
        elif is_note(message):
            stem = sounding.get((message.channel, message.note))
        stems.append(stem)
    return stems


def _stem_of(channel, program):
    if channel == DRUM_CHANNEL:
        return "drums"
    if program in BASS_PROGRAMS:
        return "bass"
    if program in VOICE_PROGRAMS:
        return "vocals"
    return "other"


def notes(events, lead=None):
    """Returns the notes as a list of Note in order of their start; a note that never ends lasts to the song's end.

    Stems are those of assign_stems.
    """
    found, sounding = [], {}

    def finish(key, end):
        if key in sounding:
            start, velocity, stem = sounding.pop(key)
            found.append(Note(start, end, key[1], velocity, key[0], stem))

    for event, stem in zip(events, assign_stems(events, lead)):
        if not is_note(event.message):
            continue
        key = (event.message.channel, event.message.note)
        finish(key, event.seconds)
        if starts_note(event.message):
            sounding[key] = (event.seconds, event.message.velocity, stem)
    for key in list(sounding):
        finish(key, events[-1].seconds)
    return sorted(found, key=lambda note: (note.start, note.channel, note.pitch))


def lead_channel(song_notes):
    """Returns the channel of 'other' that is most like a sung line, None when no channel has 24 notes.

    Sung lines have one note at a time, notes of 0.12 to 2 s, several pitches near the voice, and go on through the
    song; the score is the product of these four.
    """
    channels = {}
    for note in song_notes:
        if note.stem == "other":
            channels.setdefault(note.channel, []).append(note)
    scores = {channel: _likeness_to_singing(line) for channel, line in channels.items() if len(line) >= 24}
    return max(scores, key=scores.get, default=None)


def _likeness_to_singing(line):
    gaps = [later.start - earlier.start for earlier, later in zip(line, line[1:])]
    alone = sum(gap >= 0.03 for gap in gaps) / len(gaps)
    singable = sum(0.12 < note.end - note.start < 2 for note in line) / len(line)
    median_pitch = sorted(note.pitch for note in line)[len(line) // 2]
    in_range = 1.0 if 52 <= median_pitch <= 86 else 0.3
    melodic = min(1.0, len({note.pitch for note in line}) / 7)
    length = max(note.end for note in line)
    coverage = len({int(note.start / 4) for note in line}) / (length / 4 + 1)
    return alone**2 * singable * in_range * melodic * (0.3 + coverage)


def sung_line(song_notes):
    """Returns the notes of LEAD as a singer would take them: one at a time, moved by octaves into the voice.

    Of notes that begin together the highest counts. The whole line moves so that its median is near the middle of
    the range, then single notes that are still outside.
    """
    line = []
    lead_notes = (note for note in song_notes if note.stem == LEAD)
    for note in sorted(lead_notes, key=lambda note: (round(note.start / 0.03), -note.pitch)):
        if line and note.start - line[-1].start < 0.08:
            continue
        if line and line[-1].end > note.start:
            line[-1] = replace(line[-1], end=note.start)
        line.append(note)
    if not line:
        return []
    median_pitch = sorted(note.pitch for note in line)[len(line) // 2]
    octaves = round((MIDDLE_SUNG - median_pitch) / 12)
    return [replace(note, pitch=_into_voice(note.pitch + 12 * octaves)) for note in line
            if note.end - note.start > 0.07]


def _into_voice(pitch):
    while pitch < LOWEST_SUNG:
        pitch += 12
    while pitch > HIGHEST_SUNG:
        pitch -= 12
    return pitch


def fullest_start(song_notes, seconds, step=2.0):
    """Returns (start, coverage): where the stem that sounds least of the four sounds most within `seconds`.

    Coverage is that stem's share of the excerpt, 0 to 1, in tenths of a second.
    """
    length = max(note.end for note in song_notes)
    sounding = {stem: bytearray(int(length * 10) + 2) for stem in STEMS}
    for note in song_notes:
        # A drum note's length says nothing: a stroke counts for 0.4 s
        end = note.start + 0.4 if note.stem == "drums" else note.end
        tenths = sounding["vocals" if note.stem == LEAD else note.stem]
        for tenth in range(int(note.start * 10), min(int(end * 10) + 1, len(tenths))):
            tenths[tenth] = 1
    best = (0.0, -1.0)
    start = 0.0
    while start == 0.0 or start + seconds <= length:
        first, last = int(start * 10), int(min(start + seconds, length) * 10)
        coverage = min(sum(tenths[first:last]) for tenths in sounding.values()) / max(1, last - first)
        if coverage > best[1]:
            best = (start, coverage)
        start += step
    return best


def excerpt(events, start, seconds):
    """Returns the events of [start, start + seconds), times counted from start.

    Programs and controllers set earlier are kept at time 0. Notes that began earlier are left out; those that sound
    at the end stop there.
    """
    cut, sounding = [], set()
    for event in events:
        at, message = event.seconds - start, event.message
        key = (message.channel, message.note) if is_note(message) else None
        if key is None:
            if at < seconds:
                cut.append(Event(max(0.0, at), message))
        elif starts_note(message):
            if 0 <= at < seconds:
                sounding.add(key)
                cut.append(Event(at, message))
        elif key in sounding:
            sounding.discard(key)
            cut.append(Event(min(at, seconds), message))
    for channel, pitch in sorted(sounding):
        cut.append(Event(seconds, mido.Message("note_off", channel=channel, note=pitch)))
    return cut


def stem_events(events, stem, lead=None):
    """Returns the events that make one stem sound: its notes and everything that is no note."""
    return [event for event, owner in zip(events, assign_stems(events, lead))
            if owner == stem or not is_note(event.message)]


def line_events(line, program):
    """Returns the events that play a list of Note on channel 1 with one program."""
    events = [Event(0.0, mido.Message("program_change", channel=0, program=program))]
    for note in line:
        events.append(Event(note.start, mido.Message("note_on", channel=0, note=note.pitch, velocity=note.velocity)))
        events.append(Event(note.end, mido.Message("note_off", channel=0, note=note.pitch)))
    # At one time the old note ends before the next begins
    return sorted(events, key=lambda event: (event.seconds, starts_note(event.message)))


def write_midi(events, path):
    """Writes events as a MIDI file of one track; 1920 ticks a second keep times to 0.3 ms."""
    ticks_per_second = 1920
    track, last = mido.MidiTrack(), 0
    for event in events:
        tick = round(event.seconds * ticks_per_second)
        track.append(event.message.copy(time=tick - last))
        last = tick
    # Without a tempo event MIDI runs at 120 beats a minute, two beats a second
    file = mido.MidiFile(type=0, ticks_per_beat=ticks_per_second // 2)
    file.tracks.append(track)
    file.save(path)
