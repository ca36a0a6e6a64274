/**
 * A client of a tta daemon: predictions and labels over ZeroMQ. The wire is described in ../README.md.
 *
 *     const client = new Client({ endpoint: "tcp://127.0.0.1:5555", control: "tcp://127.0.0.1:5556" });
 *     const answer = await client.predict(bytes, [n, height, width, 3]); // uint8, row-major, channels last
 *     await client.label(answer.predictionIds, [7, 3]);
 *     client.close();
 */
import { randomBytes } from "node:crypto";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const VERSION = 1;
const RESOURCE_EXHAUSTED = 8;
const DEADLINE_EXCEEDED = 4;
const UNAVAILABLE = 14;
const RECONNECT_S = 0.05;
const ATTEMPTS = 4; // of a request without an answer, in its time

/** What the daemon answered instead, or that it did not: `code` is one of gRPC's. */
export class TTAError extends Error {
  constructor(code, message, retryAfterS) {
    super(message);
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** One socket, on which many requests may wait for their answers. */
class Connection {
  constructor(endpoint, keys, immediate) {
    const curve = keys && endpoint.startsWith("tcp:")
      ? { curveServerKey: keys.server, curvePublicKey: keys.public, curveSecretKey: keys.secret } : {};
    this.endpoint = endpoint;
    const bounds = { linger: 0, receiveHighWaterMark: 0, sendHighWaterMark: 0, sendTimeout: immediate ? 0 : -1 };
    this.socket = new Dealer({ ...bounds, immediate, ...curve }); // immediate: nothing queues without a connection
    this.socket.connect(endpoint);
    this.waiting = new Map(); // request id to what takes its answer
    this.sending = Promise.resolve(); // a socket sends one message at a time
    this.receive();
  }

  async receive() {
    for await (const [header, ...tensors] of this.socket) {
      try {
        const reply = decode(header);
        this.waiting.get(reply.id)?.({ ...reply, tensors });
      } catch { continue; } // what answers there is no tta
    }
  }

  /** Send a request, again while it is not answered if it may be, and give its reply. */
  request(header, payload, timeoutS, again) {
    const frames = [encode(header), ...(payload ? [payload] : [])];
    const until = Date.now() + 1000 * timeoutS;
    return new Promise((resolve, reject) => {
      let timer, refusal, sent = false;
      const end = (finish, value) => {
        clearTimeout(timer);
        this.waiting.delete(header.id);
        finish(value);
      };
      const later = (seconds) => {
        clearTimeout(timer);
        timer = setTimeout(attempt, Math.max(0, Math.min(1000 * seconds, until - Date.now())));
      };
      const attempt = () => {
        if (Date.now() >= until || (sent && !again)) {
          const silence = new TTAError(DEADLINE_EXCEEDED, `no answer from ${this.endpoint} in ${timeoutS} s`);
          return end(reject, refusal ?? silence);
        }
        sent = true;
        this.sending = this.sending.then(() => this.socket.send(frames)) // without a connection: again soon
          .catch(() => this.waiting.has(header.id) && again && later(RECONNECT_S));
        later(again ? timeoutS / ATTEMPTS : timeoutS);
      };
      this.waiting.set(header.id, (reply) => {
        if (reply.code === 0) return end(resolve, reply);
        refusal = new TTAError(reply.code, reply.error, reply.retry_after_s);
        if (!again || ![RESOURCE_EXHAUSTED, UNAVAILABLE].includes(reply.code)) return end(reject, refusal);
        return later(reply.retry_after_s ?? 0.1);
      });
      attempt();
    });
  }
}

export class Client {
  /**
   * @param {object} options
   * @param {string} [options.endpoint] where the server takes predictions
   * @param {string} [options.control] where the daemon takes labels and commands
   * @param {number} [options.timeoutS] how long any call waits for its answer
   * @param {{public: string, secret: string, server: string}} [options.keys] where the daemon asks for keys: your
   *     own pair and the daemon's public key, 40 characters of Z85 each
   */
  constructor({ endpoint = "tcp://127.0.0.1:5555", control = "tcp://127.0.0.1:5556", timeoutS = 10, keys } = {}) {
    this.timeoutS = timeoutS;
    this.server = new Connection(endpoint, keys, true);
    this.daemon = new Connection(control, keys, false);
    this.name = randomBytes(8).toString("hex"); // under which the server knows a request that comes again
    this.lastId = 0;
  }

  /**
   * Classify images.
   * @param {Uint8Array} images N x H x W x C bytes, row-major
   * @param {number[]} shape [N, H, W, C]
   * @param {{deadlineS?: number, key?: string, observe?: boolean}} [options] see the wire
   */
  async predict(images, shape, { deadlineS, key, observe } = {}) {
    const header = { v: VERSION, op: "predict", id: ++this.lastId, dtype: "uint8", shape, client: this.name };
    if (deadlineS !== undefined) header.deadline_s = deadlineS;
    if (key !== undefined) header.key = key;
    if (observe !== undefined) header.observe = observe;
    const reply = await this.server.request(header, images, this.timeoutS, true);
    const [n, k] = reply.shape;
    const logits = new Float32Array(Uint8Array.from(reply.tensors[0]).buffer); // a copy, aligned
    const rows = Array.from({ length: n }, (_, i) => logits.subarray(i * k, (i + 1) * k));
    return {
      logits: rows,
      classes: rows.map((row) => row.indexOf(Math.max(...row))),
      version: reply.version,
      predictionIds: rows.map((_, i) => reply.prediction_id + i),
    };
  }

  /** Say what images really showed: a class index for each prediction. Gives the outcome of each. */
  async label(predictionIds, labels) {
    return (await this.call("label", { prediction_ids: predictionIds, labels })).outcomes;
  }

  /** Send any control request and give its reply's fields. */
  async call(op, fields = {}) {
    const { tensors, ...reply } = await this.daemon.request(
      { v: VERSION, op, id: ++this.lastId, ...fields }, undefined, this.timeoutS, false);
    return reply;
  }

  /** Name, inputs, outputs, classes and version of the served model. */
  metadata() {
    return this.server.request({ v: VERSION, op: "metadata", id: ++this.lastId }, undefined, this.timeoutS, true);
  }

  close() {
    this.server.socket.close();
    this.daemon.socket.close();
  }
}
