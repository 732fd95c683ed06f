//! `auth-daemon unload`: removes a stopped daemon's programs, maps, rules and routes from the kernel.

use std::path::PathBuf;

use crate::config::Config;
use auth_datapath::{self, PinLock};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The configuration that the daemon ran with.
    #[arg(long)]
    config: PathBuf,
}

pub(super) fn unload(arguments: &Arguments) -> anyhow::Result<()> {
    let config = Config::load(&arguments.config)?;
    if !config.pins.exists() {
        println!(
            "nothing is loaded: {} does not exist",
            config.pins.display()
        );
        return Ok(());
    }
    let pods = auth_datapath::unload::unload(PinLock::take(&config.pins)?)?;
    println!(
        "unloaded: {pods} pods released, {} removed; pods now communicate in plaintext",
        config.pins.display()
    );
    Ok(())
}
