//! The choices of a server in a TLS handshake, read from the wire: the ServerHello (RFC 8446 §4.1.3) is not encrypted.

use anyhow::{Context, Result, bail};

/// The choices in a ServerHello, as numbers of the IANA registries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ServerHello {
    /// `supported_versions`; 0x0304 is TLS 1.3. `None` in TLS 1.2 and older.
    pub(super) version: Option<u16>,
    /// The group of `key_share`.
    pub(super) group: Option<u16>,
    /// The cipher suite.
    pub(super) suite: u16,
}

pub(super) const TLS_1_3: u16 = 0x0304;
pub(super) const X25519_MLKEM768: u16 = 0x11ec;

/// Parses the ServerHello at the start of what a server sent.
///
/// # Errors
/// If there is none.
pub(super) fn server_hello(stream: &[u8]) -> Result<ServerHello> {
    let mut record = Reader(stream);
    let (kind, _version) = (record.u8()?, record.u16()?);
    if kind != HANDSHAKE {
        bail!("the server's first record is of type {kind}, not a handshake");
    }
    let length = record.u16()?;
    let mut message = Reader(record.take(length.into())?);
    let kind = message.u8()?;
    if kind != SERVER_HELLO {
        bail!("the server's first message is of type {kind}, not a ServerHello");
    }
    let length = usize::from(message.u8()?) << 16 | usize::from(message.u16()?);
    let mut hello = Reader(message.take(length)?);
    let _legacy_version = hello.u16()?;
    if hello.take(RANDOM)? == HELLO_RETRY_REQUEST {
        bail!("the server asks for another ClientHello");
    }
    let session_id = hello.u8()?;
    hello.take(session_id.into())?;
    let suite = hello.u16()?;
    let _compression = hello.u8()?;
    let length = hello.u16()?;
    let mut extensions = Reader(hello.take(length.into())?);
    let (mut version, mut group) = (None, None);
    while !extensions.0.is_empty() {
        let (kind, length) = (extensions.u16()?, extensions.u16()?);
        let mut extension = Reader(extensions.take(length.into())?);
        match kind {
            SUPPORTED_VERSIONS => version = Some(extension.u16()?),
            KEY_SHARE => group = Some(extension.u16()?),
            _ => {}
        }
    }
    Ok(ServerHello {
        version,
        group,
        suite,
    })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .context("the ServerHello is cut off")?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(u16::from(self.u8()?) << 8 | u16::from(self.u8()?))
    }
}

const HANDSHAKE: u8 = 22;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;
const KEY_SHARE: u16 = 51;
const RANDOM: usize = 32;
/// The random value that makes a ServerHello a HelloRetryRequest (RFC 8446 §4.1.3): SHA-256 of that word.
const HELLO_RETRY_REQUEST: [u8; RANDOM] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
    0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(random: [u8; RANDOM], extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend(random);
        body.extend([0, 0x13, 0x01, 0]);
        body.extend([0, extensions.len() as u8]);
        body.extend(extensions);
        let mut record = vec![22, 3, 3, 0, body.len() as u8 + 4, 2, 0, 0, body.len() as u8];
        record.extend(body);
        record
    }

    #[test]
    fn the_choices_are_read() {
        let bytes = hello(
            [7; RANDOM],
            &[0, 43, 0, 2, 3, 4, 0, 51, 0, 5, 0x11, 0xec, 0, 1, 9],
        );
        let read = server_hello(&bytes).unwrap();
        assert_eq!(read.version, Some(TLS_1_3));
        assert_eq!(read.group, Some(X25519_MLKEM768));
        assert_eq!(read.suite, 0x1301);
        for length in 0..bytes.len() {
            assert!(server_hello(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn tls_1_2_names_no_version() {
        let read = server_hello(&hello([7; RANDOM], &[])).unwrap();
        assert_eq!((read.version, read.group), (None, None));
    }

    #[test]
    fn what_is_no_server_hello_is_refused() {
        assert!(server_hello(b"HTTP/1.1 200 OK\r\n").is_err());
        assert!(server_hello(&hello(HELLO_RETRY_REQUEST, &[])).is_err());
    }
}
