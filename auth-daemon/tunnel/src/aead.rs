//! The ciphers of the record layer (RFC 8446 §5.2). Each key uses the library that is fastest on this processor.
//!
//! The daemon's cryptography library is aws-lc-rs, which has AES-GCM for AVX-512. It lacks AES-GCM for processors that
//! process two blocks at once (VAES) without AVX-512, such as AMD's third EPYC generation and Intel's processors
//! without AVX-512. On those, ring takes half the time.

use aws_lc_rs::aead as aws_lc;
use ring::aead as ring;

/// Size of a record's header, in bytes: type, version and length (RFC 8446 §5.1).
pub(super) const HEADER_BYTES: usize = 5;

/// Header of a record. It is authenticated but not encrypted.
pub(super) type Header = [u8; HEADER_BYTES];
/// Size of an authentication tag, in bytes.
pub(super) const TAG_BYTES: usize = 16;

/// Key of one direction of a connection.
pub(super) enum AeadKey {
    AwsLc(aws_lc::LessSafeKey),
    Ring(Box<ring::LessSafeKey>),
}

/// Library that implements a cipher.
#[derive(Clone, Copy, Debug)]
enum Library {
    AwsLc,
    Ring,
}

/// A cipher of TLS 1.3.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

/// Creates the library's key. `None` if the bytes do not have the length that the cipher requires.
macro_rules! key {
    ($library:ident, $cipher:expr, $bytes:expr) => {{
        let algorithm = match $cipher {
            Cipher::Aes128Gcm => &$library::AES_128_GCM,
            Cipher::Aes256Gcm => &$library::AES_256_GCM,
            Cipher::Chacha20Poly1305 => &$library::CHACHA20_POLY1305,
        };
        $library::LessSafeKey::new($library::UnboundKey::new(algorithm, $bytes).ok()?)
    }};
}

impl AeadKey {
    /// `None` if `bytes` do not have the length that `cipher` requires.
    pub(super) fn new(cipher: Cipher, bytes: &[u8]) -> Option<Self> {
        Self::of(Library::fastest(), cipher, bytes)
    }

    fn of(library: Library, cipher: Cipher, bytes: &[u8]) -> Option<Self> {
        Some(match library {
            Library::AwsLc => Self::AwsLc(key!(aws_lc, cipher, bytes)),
            Library::Ring => Self::Ring(Box::new(key!(ring, cipher, bytes))),
        })
    }

    /// Encrypts `bytes` in place and returns the tag. `None` if `bytes` is larger than 64 GiB.
    pub(super) fn seal(
        &self,
        nonce: [u8; 12],
        header: Header,
        bytes: &mut [u8],
    ) -> Option<[u8; TAG_BYTES]> {
        match self {
            Self::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, aws_lc::Aad::from(header), bytes);
                tag.ok()?.as_ref().try_into().ok()
            }
            Self::Ring(key) => {
                let nonce = ring::Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, ring::Aad::from(header), bytes);
                tag.ok()?.as_ref().try_into().ok()
            }
        }
    }

    /// Decrypts in place `bytes`, which end with their tag. `None` if the tag does not match.
    pub(super) fn open<'a>(
        &self,
        nonce: [u8; 12],
        header: Header,
        bytes: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        match self {
            Self::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, aws_lc::Aad::from(header), bytes)
                    .ok()
            }
            Self::Ring(key) => {
                let nonce = ring::Nonce::assume_unique_for_key(nonce);
                key.open_in_place(nonce, ring::Aad::from(header), bytes)
                    .ok()
            }
        }
    }
}

impl Library {
    #[cfg(target_arch = "x86_64")]
    fn fastest() -> Self {
        // The standard library queries the processor once and caches the result.
        let two_blocks = is_x86_feature_detected!("vaes")
            && is_x86_feature_detected!("vpclmulqdq")
            && is_x86_feature_detected!("avx2");
        if two_blocks && !is_x86_feature_detected!("avx512bw") {
            Self::Ring
        } else {
            Self::AwsLc
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn fastest() -> Self {
        Self::AwsLc
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIBRARIES: [Library; 2] = [Library::AwsLc, Library::Ring];

    fn keys(cipher: Cipher, bytes: &[u8; 32]) -> [AeadKey; 2] {
        let length = match cipher {
            Cipher::Aes128Gcm => 16,
            Cipher::Aes256Gcm | Cipher::Chacha20Poly1305 => 32,
        };
        LIBRARIES.map(|library| {
            assert!(AeadKey::of(library, cipher, &bytes[..length - 1]).is_none());
            AeadKey::of(library, cipher, &bytes[..length]).unwrap()
        })
    }

    proptest! {
        #[test]
        fn each_library_opens_what_the_other_seals(
            cipher in prop::sample::select(vec![
                Cipher::Aes128Gcm,
                Cipher::Aes256Gcm,
                Cipher::Chacha20Poly1305,
            ]),
            key: [u8; 32],
            nonce: [u8; 12],
            header: Header,
            plain in prop::collection::vec(any::<u8>(), 0..20_000),
        ) {
            let keys = keys(cipher, &key);
            let [sealed, by_the_other] = keys.each_ref().map(|key| {
                let mut bytes = plain.clone();
                let tag = key.seal(nonce, header, &mut bytes).unwrap();
                bytes.extend(tag);
                bytes
            });
            prop_assert_eq!(&sealed, &by_the_other);
            for key in &keys {
                let mut bytes = sealed.clone();
                prop_assert_eq!(&*key.open(nonce, header, &mut bytes).unwrap(), &plain[..]);
                let mut bytes = sealed.clone();
                bytes[plain.len() / 2] ^= 1;
                prop_assert!(key.open(nonce, header, &mut bytes).is_none(), "damaged");
                let mut other = header;
                other[0] ^= 1;
                prop_assert!(key.open(nonce, other, &mut sealed.clone()).is_none());
                let mut short = sealed[..TAG_BYTES - 1].to_vec();
                prop_assert!(key.open(nonce, header, &mut short).is_none());
            }
        }
    }
}
