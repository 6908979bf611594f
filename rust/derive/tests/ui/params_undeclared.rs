use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
#[params("netdev", "device")]
struct Tap {
    #[property(param = "netdev")]
    id: String,
    #[property(param = "devise")]
    driver: String,
}

#[derive(CmdLineParams)]
struct Rtc {
    #[property(param = "clock")]
    base: String,
}

fn main() {}
