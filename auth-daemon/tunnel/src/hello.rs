//! Distinguishes the tunnel from plaintext by the first bytes of a connection, which are peeked at and stay in the socket.

/// Largest record that can be a tunnel's ClientHello, in bytes. Those that this daemon sends are far smaller.
const MAX_HELLO_BYTES: usize = 8 * 1024;
/// Number of bytes to peek at: a whole record of the largest size.
pub const PEEK_BYTES: usize = RECORD_HEADER_BYTES + MAX_HELLO_BYTES;

const RECORD_HEADER_BYTES: usize = 5;
const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const ALPN_EXTENSION: u16 = 16;

/// Protocol of a connection, judged by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstBytes {
    /// A ClientHello that offers the tunnel's ALPN protocol.
    Tunnel,
    /// Anything else, including the app's own TLS.
    Plaintext,
    /// Too few bytes to decide.
    Undecided,
}

/// Classifies the first bytes of a connection. A ClientHello that offers `alpn` starts a tunnel.
///
/// A ClientHello split over several records counts as plaintext, because this daemon never sends one.
pub fn classify(bytes: &[u8], alpn: &[u8]) -> FirstBytes {
    let mut record = Reader(bytes);
    match record.u8() {
        None => return FirstBytes::Undecided,
        Some(HANDSHAKE_RECORD) => {}
        Some(_) => return FirstBytes::Plaintext,
    }
    match record.u8() {
        None => return FirstBytes::Undecided,
        Some(3) => {}
        Some(_) => return FirstBytes::Plaintext,
    }
    let (Some(_minor), Some(length)) = (record.u8(), record.u16()) else {
        return FirstBytes::Undecided;
    };
    let length = usize::from(length);
    if length == 0 || length > MAX_HELLO_BYTES {
        return FirstBytes::Plaintext;
    }
    match record.u8() {
        None => return FirstBytes::Undecided,
        Some(CLIENT_HELLO) => {}
        Some(_) => return FirstBytes::Plaintext,
    }
    let Some(fragment) = record.take(length - 1) else {
        return FirstBytes::Undecided;
    };
    match offers(fragment, alpn) {
        Some(true) => FirstBytes::Tunnel,
        _ => FirstBytes::Plaintext,
    }
}

/// Whether the ClientHello (RFC 8446 §4.1.2, from its length on) offers `alpn`. `None` if it is malformed.
fn offers(fragment: &[u8], alpn: &[u8]) -> Option<bool> {
    let mut hello = Reader(fragment);
    let length = usize::from(hello.u8()?) << 16 | usize::from(hello.u16()?);
    let mut hello = Reader(hello.take(length)?);
    hello.take(2 + 32)?;
    let session_id = hello.u8()?;
    hello.take(session_id.into())?;
    let cipher_suites = hello.u16()?;
    hello.take(cipher_suites.into())?;
    let compression_methods = hello.u8()?;
    hello.take(compression_methods.into())?;
    let extensions = hello.u16()?;
    let mut extensions = Reader(hello.take(extensions.into())?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let length = extensions.u16()?;
        let mut extension = Reader(extensions.take(length.into())?);
        if kind == ALPN_EXTENSION {
            let length = extension.u16()?;
            let mut protocols = Reader(extension.take(length.into())?);
            while !protocols.0.is_empty() {
                let length = protocols.u8()?;
                if protocols.take(length.into())? == alpn {
                    return Some(true);
                }
            }
        }
    }
    Some(false)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ClientHello record with one ALPN protocol.
    fn hello(alpn: &[u8]) -> Vec<u8> {
        let mut extension = vec![];
        extension.extend_from_slice(&(alpn.len() as u16 + 1).to_be_bytes());
        extension.push(alpn.len() as u8);
        extension.extend_from_slice(alpn);
        let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
        extensions.extend_from_slice(&ALPN_EXTENSION.to_be_bytes());
        extensions.extend_from_slice(&(extension.len() as u16).to_be_bytes());
        extensions.extend_from_slice(&extension);
        let mut body = vec![3, 3];
        body.extend_from_slice(&[7; 32]);
        body.extend_from_slice(&[0, 0, 2, 0x13, 1, 1, 0]);
        body.extend_from_slice(&(extensions.len() as u16).to_be_bytes());
        body.extend_from_slice(&extensions);
        let mut record = vec![22, 3, 1];
        record.extend_from_slice(&(body.len() as u16 + 4).to_be_bytes());
        record.extend_from_slice(&[1, 0]);
        record.extend_from_slice(&(body.len() as u16).to_be_bytes());
        record.extend_from_slice(&body);
        record
    }

    #[test]
    fn distinguishes_ours_from_others() {
        let ours = hello(b"auth-daemon/1");
        assert_eq!(classify(&ours, b"auth-daemon/1"), FirstBytes::Tunnel);
        assert_eq!(
            classify(&hello(b"h2"), b"auth-daemon/1"),
            FirstBytes::Plaintext
        );
        for length in 0..ours.len() {
            assert_eq!(
                classify(&ours[..length], b"auth-daemon/1"),
                FirstBytes::Undecided,
                "{length}"
            );
        }
        for other in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x16GET",
            b"\x16\x03\x01\x00\x00",
            b"\x16\x03\x01\x00\x05\x02",
        ] {
            assert_eq!(classify(other, b"auth-daemon/1"), FirstBytes::Plaintext);
        }
    }

    #[test]
    fn malformed_hellos_are_not_ours() {
        let ours = hello(b"auth-daemon/1");
        for index in 5..ours.len() {
            for value in [0, 0xff] {
                let mut bad = ours.clone();
                bad[index] = value;
                // Any result is allowed, as long as there is no panic.
                let _ = classify(&bad, b"auth-daemon/1");
            }
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = classify(&bytes, b"x");
            let mut hello = vec![22, 3, 1, 0, bytes.len() as u8 + 1, 1];
            hello.extend_from_slice(&bytes);
            let _ = classify(&hello, b"x");
        }
    }
}
