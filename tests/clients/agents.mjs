// A RealtimeSession of @openai/agents-realtime over its websocket transport: node agents.mjs URL FILE, the file with
// 16-bit mono PCM at 24 kHz. It speaks the file, interrupts the reply to it after half a second, speaks the file
// again to interrupt the second reply, and prints what the session told its application as one JSON object.
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { RealtimeAgent, RealtimeSession } from '@openai/agents-realtime';

const [url, file] = process.argv.slice(2);
const CHUNK_MS = 100;
const CHUNK = 24 * 2 * CHUNK_MS; // bytes
const LONGEST_WAIT = 20000; // milliseconds

const report = { events: [], errors: [], types: [], understood: [], deltas: '', audioBytes: [], history: [] };
const session = new RealtimeSession(new RealtimeAgent({ name: 'parrot', instructions: 'Say it back.' }), {
  transport: 'websocket',
});
for (const name of ['agent_start', 'agent_end', 'audio_start', 'audio_stopped', 'audio_interrupted', 'history_added'])
  session.on(name, () => report.events.push(name));
session.on('agent_start', () => report.audioBytes.push(0));
session.on('audio', ({ data }) => (report.audioBytes[report.audioBytes.length - 1] += data.byteLength));
session.on('error', ({ error }) => report.errors.push(error?.message ?? JSON.stringify(error)));
session.on('history_updated', (history) => (report.history = history));
// The transport tells '*' of every message, and of its type only if the message fits the client's schema of it.
session.transport.on('*', ({ type }) => {
  if (report.types.includes(type)) return;
  report.types.push(type);
  if (type !== 'error') session.transport.once(type, () => report.understood.push(type));
});
session.transport.on('conversation.item.input_audio_transcription.delta', ({ delta }) => (report.deltas += delta));

const next = (emitter, name) => once(emitter, name, { signal: AbortSignal.timeout(LONGEST_WAIT) });
const sound = readFileSync(file);
const silence = Buffer.alloc(CHUNK);
const send = (data) => session.sendAudio(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength));

// A microphone: what is put into `line`, then silence, in real time.
const line = [];
const speak = () => {
  for (let at = 0; at < sound.length; at += CHUNK) line.push(sound.subarray(at, at + CHUNK));
};

await session.connect({ apiKey: 'unused', url });
const microphone = setInterval(() => send(line.shift() ?? silence), CHUNK_MS);

speak();
await next(session, 'audio_stopped');
await sleep(500);
let interrupted = next(session.transport, 'conversation.item.truncated');
session.interrupt();
report.interrupted = (await interrupted)[0].audio_end_ms;

speak();
await next(session, 'audio_stopped');
speak();
interrupted = next(session.transport, 'conversation.item.truncated');
report.spokenOver = (await interrupted)[0].audio_end_ms;

clearInterval(microphone);
session.close();
console.log(JSON.stringify(report));
