use kuasar_derive::CmdLineParams;

#[derive(CmdLineParams)]
enum Accel {
    Kvm,
}

fn main() {}
