"""An HBONE client made of Python's ssl and h2. Prints one JSON object about what it saw.

Arguments: the folder with the certificate, the server's address, and a JSON object of :authority by purpose.
"""

import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.errors
import h2.events

FOLDER, ADDRESS, AUTHORITIES = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
PORT = 15008


class Connection:
    def __init__(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The server's name is a SPIFFE ID, which `identity` reads.
        context.check_hostname = False
        context.load_verify_locations(f"{FOLDER}/root.pem")
        context.load_cert_chain(f"{FOLDER}/certificate.pem", f"{FOLDER}/key.pem")
        context.set_alpn_protocols(["h2"])
        tcp = socket.create_connection((ADDRESS, PORT), timeout=120)
        self.tls = context.wrap_socket(tcp)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration())
        self.h2.initiate_connection()
        self.events = []
        self.flush()

    def identity(self):
        names = self.tls.getpeercert()["subjectAltName"]
        return [name for kind, name in names if kind == "URI"]

    def flush(self):
        self.tls.sendall(self.h2.data_to_send())

    def receive(self):
        received = self.tls.recv(1 << 16)
        if not received:
            raise EOFError("the server has closed the connection")
        for event in self.h2.receive_data(received):
            if isinstance(event, h2.events.DataReceived):
                length = event.flow_controlled_length
                self.h2.acknowledge_received_data(length, event.stream_id)
            self.events.append(event)
        self.flush()

    def wait(self, stream, kinds):
        """The next event of these kinds on a stream. Others of the stream are dropped."""
        while True:
            for number, event in enumerate(self.events):
                if getattr(event, "stream_id", None) == stream and isinstance(event, kinds):
                    del self.events[: number + 1]
                    return event
            self.receive()

    def connect(self, authority):
        """Opens a stream, and returns it with the status of the answer."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [(":method", "CONNECT"), (":authority", authority)])
        self.flush()
        answer = self.wait(stream, h2.events.ResponseReceived)
        # As bytes or as text, by the version of h2.
        text = lambda part: part.decode() if isinstance(part, bytes) else part
        headers = {text(name): text(value) for name, value in answer.headers}
        return stream, int(headers[":status"])

    def open(self, authority):
        stream, status = self.connect(authority)
        if status != 200:
            raise ValueError(f"{authority} answers {status}")
        return stream

    def send(self, stream, data, end=False):
        while data:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room == 0:
                self.receive()
                continue
            self.h2.send_data(stream, data[:room])
            self.flush()
            data = data[room:]
        if end:
            self.h2.end_stream(stream)
            self.flush()

    def read(self, stream, count=None):
        """Reads so many bytes, or all to the end of the stream."""
        data = b""
        while count is None or len(data) < count:
            event = self.wait(stream, (h2.events.DataReceived, h2.events.StreamEnded))
            if isinstance(event, h2.events.StreamEnded):
                break
            data += event.data
        return data


def main():
    connection = Connection()
    seen = {"identity": connection.identity()}

    sent = bytes(number % 251 for number in range(1 << 20))
    stream = connection.open(AUTHORITIES["echo"])
    back = b""
    for start in range(0, len(sent), 1 << 16):
        piece = sent[start : start + (1 << 16)]
        connection.send(stream, piece)
        back += connection.read(stream, len(piece))
    seen["echoed"] = len(back) if back == sent else "other bytes"
    connection.send(stream, b"", end=True)
    seen["after_end"] = len(connection.read(stream))

    stream = connection.open(AUTHORITIES["half-close"])
    connection.send(stream, b"first", end=True)
    seen["half_close"] = connection.read(stream).decode()

    stream = connection.open(AUTHORITIES["resets"])
    connection.send(stream, b"12345")
    seen["reset"] = connection.wait(stream, h2.events.StreamReset).error_code

    stream = connection.open(AUTHORITIES["witness"])
    connection.send(stream, b"some bytes")
    connection.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
    connection.flush()

    refused = {}
    for name in ["malformed", "denied", "unreachable"]:
        _, refused[name] = connection.connect(AUTHORITIES[name])
    seen["refused"] = refused
    print(json.dumps(seen))


main()
