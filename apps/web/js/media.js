// Microphone, speaker, camera and screen: choosing them, their level, and what to say when they fail.

const PROBLEMS = {
  NotAllowedError: "The browser may not use the microphone or camera. Allow it in the address bar, then try again.",
  NotFoundError: "No such device was found. Plug one in, or choose another.",
  NotReadableError: "Another program is using this device.",
  OverconstrainedError: "This device is gone. Choose another.",
  AbortError: "The device stopped before it began.",
};

export function explain(error) {
  return PROBLEMS[error.name] ?? error.message;
}

export async function microphone(deviceId) {
  if (!navigator.mediaDevices) {
    throw new Error("Browsers give the microphone only to pages on this computer or over https. Open this page that way.");
  }
  const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
  if (deviceId) audio.deviceId = { exact: deviceId };
  return navigator.mediaDevices.getUserMedia({ audio });
}

export function camera() {
  return navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, frameRate: { max: 15 } } });
}

export async function screen() {
  const stream = await navigator.mediaDevices.getDisplayMedia({ video: { frameRate: { max: 5 } } });
  for (const track of stream.getVideoTracks()) track.contentHint = "detail";
  return stream;
}

/** Put the devices of this kind into a <select>, keeping the choice. */
export async function list(select, kind) {
  if (!navigator.mediaDevices?.enumerateDevices) return;
  const chosen = select.value;
  const devices = (await navigator.mediaDevices.enumerateDevices()).filter((one) => one.kind === kind && one.deviceId);
  const first = select.options[0];
  const options = devices
    .filter((one) => one.deviceId !== "default")
    .map((one, i) => new Option(one.label || `${kind === "audioinput" ? "Microphone" : "Speaker"} ${i + 1}`, one.deviceId));
  select.replaceChildren(first, ...options);
  select.value = devices.some((one) => one.deviceId === chosen) ? chosen : "";
}

/** The loudness of a stream: `peak()` gives the largest sample since about the last call, 0 to 1. */
export class Ear {
  #analyser;
  #source = null;
  #samples;

  constructor(context) {
    this.#analyser = new AnalyserNode(context, { fftSize: 2048 });
    this.#samples = new Float32Array(this.#analyser.fftSize);
    this.context = context;
  }

  listen(stream) {
    this.#source?.disconnect();
    this.#source = stream ? new MediaStreamAudioSourceNode(this.context, { mediaStream: stream }) : null;
    this.#source?.connect(this.#analyser);
  }

  peak() {
    if (!this.#source) return 0;
    this.#analyser.getFloatTimeDomainData(this.#samples);
    let peak = 0;
    for (const sample of this.#samples) peak = Math.max(peak, Math.abs(sample));
    return Math.min(peak, 1);
  }
}

/** A peak as a place on a meter that spans 60 dB. */
export function loudness(peak) {
  return peak > 0 ? Math.max(0, 1 + Math.log10(peak) / 3) : 0;
}
