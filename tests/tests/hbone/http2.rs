//! A client of HTTP/2 that sends any frames (RFC 9113), so that it can also break the rules.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::Place;

use crate::common::hostile::{Peer, Presented, client_config, dial};
use crate::common::stage::Stage;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
/// Of DATA and HEADERS.
pub(crate) const END_STREAM: u8 = 1;
/// Of HEADERS and CONTINUATION.
pub(crate) const END_HEADERS: u8 = 4;
/// Of SETTINGS and PING.
const ACK: u8 = 1;
pub(crate) const CANCEL: u32 = 8;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub(crate) const PORT: u16 = 15008;

#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// The client's end of a connection.
pub(crate) struct Client {
    peer: Peer,
    received: Vec<u8>,
    /// Whether it answers SETTINGS and PING.
    pub(crate) is_polite: bool,
}

impl Client {
    /// Connects from the outside host to `web` with a valid certificate, and sends these settings.
    pub(crate) fn connect(stage: &Stage, settings: &[(u16, u32)]) -> Result<Self> {
        Self::connect_as(stage, "outsider", stage.mesh.outside(), settings)
    }

    /// Connects from a place with a certificate of the service account.
    pub(crate) fn connect_as(
        stage: &Stage,
        account: &str,
        from: &Place,
        settings: &[(u16, u32)],
    ) -> Result<Self> {
        Self::connect_with(stage, &stage.authority.mint(account)?, from, settings)
    }

    /// Connects from a place with this certificate.
    pub(crate) fn connect_with(
        stage: &Stage,
        certificate: &Presented,
        from: &Place,
        settings: &[(u16, u32)],
    ) -> Result<Self> {
        let config = client_config(Some(certificate), &[b"h2"])?;
        let tcp = dial(from, stage.web().at(PORT))?;
        let mut client = Self {
            peer: Peer::client(tcp, config)?,
            received: Vec::new(),
            is_polite: true,
        };
        client.peer.send(PREFACE)?;
        let mut payload = Vec::new();
        for (name, value) in settings {
            payload.extend_from_slice(&name.to_be_bytes());
            payload.extend_from_slice(&value.to_be_bytes());
        }
        client.send(SETTINGS, 0, 0, &payload)?;
        Ok(client)
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.peer.local()
    }

    /// Sets how long a send may wait for the server to read.
    pub(crate) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.peer.tcp.set_write_timeout(Some(timeout))
    }

    pub(crate) fn send(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        self.peer.send(&frame(kind, flags, stream, payload))
    }

    /// Sends bytes, which may be many frames.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.peer.send(bytes)
    }

    /// Requests a stream to `authority`.
    pub(crate) fn request(&mut self, stream: u32, authority: &str) -> io::Result<()> {
        self.send(HEADERS, END_HEADERS, stream, &connect(authority))
    }

    /// Requests a stream and returns the status of the answer.
    pub(crate) fn ask(&mut self, stream: u32, authority: &str) -> Result<u16> {
        self.request(stream, authority)?;
        self.answer(stream)
    }

    /// The status of the answer on a stream.
    pub(crate) fn answer(&mut self, stream: u32) -> Result<u16> {
        let frame = self.frame_of(stream)?;
        ensure!(frame.kind == HEADERS, "{frame:?}");
        status(&frame.payload)
    }

    /// The next frame of a stream. Frames of other streams and of the connection are dropped.
    pub(crate) fn frame_of(&mut self, stream: u32) -> Result<Frame> {
        self.wait(|frame| frame.stream == stream && frame.kind != WINDOW_UPDATE)
    }

    /// The next frame for which `wanted` is true.
    pub(crate) fn wait(&mut self, wanted: impl Fn(&Frame) -> bool) -> Result<Frame> {
        loop {
            let frame = self.frame().context("waiting for a frame")?;
            if wanted(&frame) {
                return Ok(frame);
            }
        }
    }

    /// Sends bytes of a stream and reads as many back.
    pub(crate) fn echo(&mut self, stream: u32, bytes: &[u8]) -> Result<()> {
        self.send(DATA, 0, stream, bytes)?;
        let mut back = Vec::new();
        while back.len() < bytes.len() {
            let frame = self.frame_of(stream)?;
            ensure!(frame.kind == DATA, "{frame:?}");
            back.extend_from_slice(&frame.payload);
        }
        ensure!(back == bytes, "not what was sent");
        Ok(())
    }

    /// Reads until the connection ends. Returns the code of the GOAWAY that came before, if any.
    pub(crate) fn end(&mut self) -> Option<u32> {
        let mut code = None;
        while let Ok(frame) = self.frame() {
            if frame.kind == GOAWAY {
                code = error_code(&frame.payload[4..]);
            }
        }
        code
    }

    /// The next frame.
    pub(crate) fn frame(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.parse() {
                if self.is_polite && frame.flags & ACK == 0 && frame.stream == 0 {
                    match frame.kind {
                        SETTINGS => self.send(SETTINGS, ACK, 0, &[])?,
                        PING => self.send(PING, ACK, 0, &frame.payload)?,
                        _ => {}
                    }
                }
                return Ok(frame);
            }
            self.more()?;
        }
    }

    fn parse(&mut self) -> Option<Frame> {
        let header = self.received.first_chunk::<9>()?;
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
        let (kind, flags) = (header[3], header[4]);
        let stream = u32::from_be_bytes([header[5], header[6], header[7], header[8]]);
        let payload = self.received.get(9..9 + length)?.to_vec();
        self.received.drain(..9 + length);
        Some(Frame {
            kind,
            flags,
            stream,
            payload,
        })
    }

    fn more(&mut self) -> io::Result<()> {
        let Peer { tls, tcp, .. } = &mut self.peer;
        let mut buffer = [0; 1 << 14];
        loop {
            match tls.reader().read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.received.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if tls.read_tls(tcp)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            tls.process_new_packets().map_err(io::Error::other)?;
            while tls.wants_write() {
                tls.write_tls(tcp)?;
            }
        }
    }
}

/// Encodes a frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend_from_slice(&[kind, flags]);
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Encodes the headers of a CONNECT (RFC 7541): literals without indexing, `:method` and `:authority`.
pub(crate) fn connect(authority: &str) -> Vec<u8> {
    let mut headers = vec![0x02, 7];
    headers.extend_from_slice(b"CONNECT");
    headers.extend_from_slice(&[0x01, authority.len() as u8]);
    headers.extend_from_slice(authority.as_bytes());
    headers
}

/// Encodes a header that is not in the static table.
pub(crate) fn header(name: &str, value: &str) -> Vec<u8> {
    let mut header = vec![0x00, name.len() as u8];
    header.extend_from_slice(name.as_bytes());
    // A length of seven bits and more.
    let length = value.len();
    if length < 127 {
        header.push(length as u8);
    } else {
        header.push(127);
        let mut rest = length - 127;
        while rest >= 128 {
            header.push((rest % 128) as u8 | 128);
            rest /= 128;
        }
        header.push(rest as u8);
    }
    header.extend_from_slice(value.as_bytes());
    header
}

/// Decodes the status of an answer: from the static table, or a literal in Huffman's code.
fn status(headers: &[u8]) -> Result<u16> {
    match headers {
        [0x88, ..] => Ok(200),
        [0x8c, ..] => Ok(400),
        [0x48 | 0x08, 0x82, 0x68, 0x01, ..] => Ok(401),
        [0x48 | 0x08, 0x83, 0x6c, 0x0c, 0xff, ..] => Ok(503),
        other => bail!("an unknown status: {other:x?}"),
    }
}

/// The code of a RST_STREAM, or of a GOAWAY after its last stream.
pub(crate) fn error_code(payload: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*payload.first_chunk()?))
}
