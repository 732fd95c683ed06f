//! Lets clients in whose requests the socket's path is the authority use the API at a Unix socket.
//!
//! gRPC's libraries for C++, Python and other languages on that core, and some versions of the one for Java, make the
//! `:authority` of a request of the socket's path, such as `run%2Fapi.sock` or `/run/api.sock`. That is no authority of a URI
//! (RFC 3986 §3.2), so the HTTP/2 library resets such a request before anybody sees it. Nothing here reads the authority. So the
//! bytes that it must not have are replaced by others as they arrive. The length stays, and with it the sizes in HPACK's table.
//! Only text without Huffman coding is read, as these clients send it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection whose reader sees no path in an `:authority`.
#[derive(Debug)]
pub(crate) struct PathAuthority<C> {
    connection: C,
    frames: Frames,
}

impl<C> PathAuthority<C> {
    pub(crate) fn new(connection: C) -> Self {
        Self {
            connection,
            frames: Frames::new(),
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for PathAuthority<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { connection, frames } = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(connection).poll_read(context, buffer))?;
        for byte in &mut buffer.filled_mut()[before..] {
            *byte = frames.pass(*byte);
        }
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for PathAuthority<C> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().connection).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().connection).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().connection).poll_shutdown(context)
    }
}

/// What a client sends, from its preface on (RFC 9113 §3.4 and §4.1).
#[derive(Debug)]
struct Frames {
    head: [u8; FRAME_HEAD],
    /// Bytes of `head` that have arrived.
    arrived: usize,
    /// Whether the next byte is the length of the padding.
    is_padded: bool,
    /// Bytes until the header fragment, of the fragment, and of the padding after it.
    before: usize,
    fragment: usize,
    after: usize,
    /// Whether the lengths contradict each other. The HTTP/2 library ends such a connection.
    is_invalid: bool,
    fields: Fields,
}

impl Frames {
    fn new() -> Self {
        Self {
            head: [0; FRAME_HEAD],
            arrived: 0,
            is_padded: false,
            before: PREFACE,
            fragment: 0,
            after: 0,
            is_invalid: false,
            fields: Fields::default(),
        }
    }

    /// Takes the next byte, and returns what is read in its place.
    fn pass(&mut self, byte: u8) -> u8 {
        if self.is_invalid {
            return byte;
        }
        if self.is_padded {
            self.is_padded = false;
            self.after = byte.into();
            self.shorten(self.after);
        } else if self.before > 0 {
            self.before -= 1;
        } else if self.fragment > 0 {
            self.fragment -= 1;
            return self.fields.pass(byte);
        } else if self.after > 0 {
            self.after -= 1;
        } else {
            self.head[self.arrived] = byte;
            self.arrived = (self.arrived + 1) % FRAME_HEAD;
            if self.arrived == 0 {
                self.begin();
            }
        }
        byte
    }

    /// Begins with the payload of the frame whose head has arrived.
    fn begin(&mut self) {
        let [a, b, c, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        match kind {
            HEADERS => {
                self.fields = Fields::default();
                self.fragment = length;
                self.is_padded = flags & PADDED != 0;
                self.before = if flags & PRIORITY != 0 {
                    PRIORITY_BYTES
                } else {
                    0
                };
                self.shorten(self.before + usize::from(self.is_padded));
            }
            CONTINUATION => self.fragment = length,
            _ => self.before = length,
        }
    }

    /// Takes bytes from the fragment that belong to something else.
    fn shorten(&mut self, by: usize) {
        match self.fragment.checked_sub(by) {
            Some(rest) => self.fragment = rest,
            None => self.is_invalid = true,
        }
    }
}

/// The fields of a header section, as HPACK writes them (RFC 7541 §6).
#[derive(Clone, Copy, Debug, Default)]
enum Fields {
    /// The first byte of a field, or of a size of the table.
    #[default]
    Begin,
    /// The rest of the number that `Begin` has begun.
    Index { number: Number, is_literal: bool },
    /// The first byte of a text's length.
    Length(Text),
    /// The rest of it.
    LengthRest {
        number: Number,
        text: Text,
        is_plain: bool,
    },
    /// A text.
    Text {
        text: Text,
        is_plain: bool,
        left: usize,
        /// Whether all bytes so far are those of `:authority`.
        is_authority: bool,
        read: usize,
    },
    /// A number is too large. The HTTP/2 library ends such a connection.
    Invalid,
}

#[derive(Clone, Copy, Debug)]
enum Text {
    Name,
    Value { is_authority: bool },
}

impl Fields {
    fn pass(&mut self, byte: u8) -> u8 {
        let mut passed = byte;
        *self = match *self {
            Self::Begin => {
                let (prefix, is_literal) = match byte {
                    0x80.. => (0x7f, false),
                    0x40.. => (0x3f, true),
                    0x20.. => (0x1f, false),
                    _ => (0x0f, true),
                };
                let index = usize::from(byte & prefix);
                if byte & prefix == prefix {
                    let number = Number::after(index);
                    Self::Index { number, is_literal }
                } else {
                    Self::indexed(index, is_literal)
                }
            }
            Self::Index { number, is_literal } => match number.then(byte) {
                Part::Number(index) => Self::indexed(index, is_literal),
                Part::Rest(number) => Self::Index { number, is_literal },
                Part::TooLarge => Self::Invalid,
            },
            Self::Length(text) => {
                let (is_plain, length) = (byte & 0x80 == 0, usize::from(byte & 0x7f));
                if length == 0x7f {
                    let number = Number::after(length);
                    Self::LengthRest {
                        number,
                        text,
                        is_plain,
                    }
                } else {
                    Self::text(text, is_plain, length)
                }
            }
            Self::LengthRest {
                number,
                text,
                is_plain,
            } => match number.then(byte) {
                Part::Number(length) => Self::text(text, is_plain, length),
                Part::Rest(number) => Self::LengthRest {
                    number,
                    text,
                    is_plain,
                },
                Part::TooLarge => Self::Invalid,
            },
            Self::Text {
                text,
                is_plain,
                left,
                is_authority,
                read,
            } => {
                if is_plain && matches!(text, Text::Value { is_authority: true }) {
                    passed = in_authority(byte);
                }
                let is_authority = is_authority && AUTHORITY.get(read) == Some(&byte);
                let (left, read) = (left - 1, read + 1);
                match text {
                    _ if left > 0 => Self::Text {
                        text,
                        is_plain,
                        left,
                        is_authority,
                        read,
                    },
                    Text::Name => {
                        let is_authority = is_plain && is_authority && read == AUTHORITY.len();
                        Self::Length(Text::Value { is_authority })
                    }
                    Text::Value { .. } => Self::Begin,
                }
            }
            Self::Invalid => Self::Invalid,
        };
        passed
    }

    /// After the index of a field or of a name, or after a size.
    fn indexed(index: usize, is_literal: bool) -> Self {
        match (is_literal, index) {
            (false, _) => Self::Begin,
            (true, 0) => Self::Length(Text::Name),
            (true, index) => Self::Length(Text::Value {
                is_authority: index == AUTHORITY_INDEX,
            }),
        }
    }

    /// After the length of a text.
    fn text(text: Text, is_plain: bool, left: usize) -> Self {
        match (left, text) {
            (0, Text::Name) => Self::Length(Text::Value {
                is_authority: false,
            }),
            (0, Text::Value { .. }) => Self::Begin,
            _ => Self::Text {
                text,
                is_plain,
                left,
                is_authority: true,
                read: 0,
            },
        }
    }
}

/// The byte of an authority that stands for this one of a path.
fn in_authority(byte: u8) -> u8 {
    match byte {
        b'/' | b'%' => b'-',
        other => other,
    }
}

/// A number of more than one byte (RFC 7541 §5.1).
#[derive(Clone, Copy, Debug)]
struct Number {
    value: usize,
    shift: u32,
}

enum Part {
    Number(usize),
    Rest(Number),
    TooLarge,
}

impl Number {
    fn after(prefix: usize) -> Self {
        Self {
            value: prefix,
            shift: 0,
        }
    }

    fn then(self, byte: u8) -> Part {
        let value = self.value + (usize::from(byte & 0x7f) << self.shift);
        match byte & 0x80 {
            0 => Part::Number(value),
            _ if self.shift == MAX_SHIFT => Part::TooLarge,
            _ => Part::Rest(Self {
                value,
                shift: self.shift + 7,
            }),
        }
    }
}

/// How HTTP/2 begins: a text of so many bytes.
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
const AUTHORITY: &[u8] = b":authority";
/// Of `:authority` in HPACK's static table.
const AUTHORITY_INDEX: usize = 1;
/// Numbers are below 2^28, far more than any text that is accepted.
const MAX_SHIFT: u32 = 21;

#[cfg(test)]
mod tests {
    use super::*;

    const START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn passed(bytes: &[u8]) -> Vec<u8> {
        let mut frames = Frames::new();
        bytes.iter().map(|byte| frames.pass(*byte)).collect()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        let head = [length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        [&head[..], payload].concat()
    }

    /// The fields of a request as gRPC's core library writes them, with this authority.
    fn request(authority: &str) -> Vec<u8> {
        let length = [authority.len() as u8];
        [
            &b"\x40\x05:path\x0c/Spiffe/a%2F\x40\x0a:authority"[..],
            &length[..],
            authority.as_bytes(),
            b"\x83\x86\x40\x02te\x08trailers\x00\x12workload.spiffe.io\x04true",
        ]
        .concat()
    }

    #[test]
    fn a_path_becomes_an_authority_of_the_same_length() {
        for (path, authority) in [
            ("run%2Fapi.sock", "run-2Fapi.sock"),
            ("/run/api.sock", "-run-api.sock"),
            ("localhost", "localhost"),
        ] {
            let sent = [START, &frame(HEADERS, 4, &request(path))].concat();
            let expected = [START, &frame(HEADERS, 4, &request(authority))].concat();
            assert_eq!(passed(&sent), expected, "{path}");
        }
    }

    #[test]
    fn the_static_tables_name_is_known() {
        // With incremental indexing, without, and never indexed.
        for first in [0x41, 0x01, 0x11] {
            let fields = |path: &[u8]| [&[0x82, first, 4][..], path, b"\x84"].concat();
            let sent = [START, &frame(HEADERS, 4, &fields(b"/a/b"))].concat();
            let expected = [START, &frame(HEADERS, 4, &fields(b"-a-b"))].concat();
            assert_eq!(passed(&sent), expected, "{first:x}");
        }
    }

    #[test]
    fn finds_it_in_any_frame_and_leaves_all_else_alone() {
        let (sent, expected) = (request("/a/b"), request("-a-b"));
        let settings = frame(4, 0, b"\x41\x04/a/b\x41\x04/");
        let pieces = |fields: &[u8]| {
            let (start, rest) = fields.split_at(34);
            let padded = [&[3, 0, 0, 0, 0, 7][..], start, b"\x41\x01/"].concat();
            [
                START,
                &settings,
                &frame(HEADERS, PADDED | PRIORITY, &padded),
                &frame(CONTINUATION, 4, rest),
                &frame(0, 1, b"\x41\x01/"),
                &frame(HEADERS, 5, fields),
            ]
            .concat()
        };
        assert_eq!(passed(&pieces(&sent)), pieces(&expected));
    }

    #[test]
    fn lengths_of_several_bytes_are_read() {
        let path = "/a".repeat(200);
        let authority = path.replace('/', "-");
        // 400 = 127 + 17 + 2 * 128
        let fields =
            |text: &str| [&b"\x41\x7f\x91\x02"[..], text.as_bytes(), b"\x41\x01/"].concat();
        let sent = [START, &frame(HEADERS, 4, &fields(&path))].concat();
        let expected = [START, &frame(HEADERS, 4, &fields(&authority))].concat();
        let mut expected = expected;
        let last = expected.len() - 1;
        expected[last] = b'-';
        assert_eq!(passed(&sent), expected);
    }

    #[test]
    fn whatever_arrives_is_passed_on() {
        for seed in 0..2000_u64 {
            // A generator of bytes that needs no library (SplitMix64).
            let mut state = seed;
            let mut bytes = START.to_vec();
            for _ in 0..40 {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let random = (mixed ^ (mixed >> 27)).to_le_bytes();
                bytes.extend(frame(random[0] % 10, random[1], &random[2..]));
                bytes.extend(&random[..usize::from(random[3] % 2)]);
            }
            let passed = passed(&bytes);
            assert_eq!(passed.len(), bytes.len());
            let changed = passed.iter().zip(&bytes).filter(|(a, b)| a != b);
            assert!(changed.into_iter().all(|(a, b)| *a == in_authority(*b)));
        }
    }
}
