//! Distinguishes TLS from other data by its records (RFC 8446, section 5.1).

use std::error::Error;
use std::fmt;

/// The header of a TLS record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsRecord {
    /// 20 change_cipher_spec, 21 alert, 22 handshake, 23 application_data.
    pub content_type: u8,
    /// The length of its fragment, in bytes.
    pub length: usize,
}

impl TlsRecord {
    /// Whether it carries encrypted data: in TLS 1.3, everything after the hello messages.
    pub fn is_application_data(self) -> bool {
        self.content_type == 23
    }
}

/// Bytes that are not a TLS record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotTls {
    /// Their offset in the stream.
    pub offset: usize,
}

impl fmt::Display for NotTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} begins no TLS record", self.offset)
    }
}

impl Error for NotTls {}

/// Parses the records of one direction of a stream. The last may be truncated.
pub fn tls_records(stream: &[u8]) -> Result<Vec<TlsRecord>, NotTls> {
    let mut records = Vec::new();
    let mut offset = 0;
    while offset < stream.len() {
        let header = &stream[offset..stream.len().min(offset + HEADER)];
        let content_type = header[0];
        // The version field says TLS 1.0 to 1.2, whatever the real version is.
        let version_fits = header.get(1).is_none_or(|major| *major == 3)
            && header.get(2).is_none_or(|minor| (1..=3).contains(minor));
        let length = match header {
            [.., high, low] if header.len() == HEADER => {
                usize::from(u16::from_be_bytes([*high, *low]))
            }
            _ => 0,
        };
        if !(20..=23).contains(&content_type) || !version_fits || length > LONGEST {
            return Err(NotTls { offset });
        }
        records.push(TlsRecord {
            content_type,
            length,
        });
        offset += HEADER + length;
    }
    Ok(records)
}

const HEADER: usize = 5;
/// In bytes: 2^14 plus the expansion by encryption that TLS 1.2 allows.
const LONGEST: usize = (1 << 14) + 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_told_from_text() {
        let stream = [22, 3, 1, 0, 2, 9, 9, 23, 3, 3, 0, 1, 7, 23, 3];
        let records = tls_records(&stream).expect("TLS");
        assert_eq!(
            records
                .iter()
                .map(|record| record.length)
                .collect::<Vec<_>>(),
            [2, 1, 0]
        );
        assert_eq!(
            tls_records(b"GET / HTTP/1.1\r\n"),
            Err(NotTls { offset: 0 })
        );
        assert_eq!(
            tls_records(&[22, 3, 1, 0, 1, 9, b'H']),
            Err(NotTls { offset: 6 })
        );
        assert_eq!(
            tls_records(&[23, 3, 3, 0xff, 0xff]),
            Err(NotTls { offset: 0 })
        );
        assert_eq!(tls_records(&[]), Ok(Vec::new()));
    }
}
