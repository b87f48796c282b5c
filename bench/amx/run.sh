#!/bin/sh
# bench/amx/run.sh TREE: products in matrix registers, on an emulated processor that has them (README.md).
set -eu
tree=$1
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d "$tree/tmp/amx.XXXXXX")
inside=${work#"$tree"}
mkdir -p "$work/iso/boot/grub"
gcc -O2 -march=sapphirerapids -mprefer-vector-width=512 -Wno-psabi -ffp-contract=fast -ffreestanding \
    -fno-tree-loop-distribute-patterns -fno-stack-protector -fno-pie -no-pie -mno-red-zone -nostdlib -static \
    -Wl,--build-id=none -Wl,--no-warn-rwx-segments -T "$here/check.ld" -I "$here/include" \
    -I "$here/../../src/fastgrpo/kernels" "$here/start.S" "$here/check.c" -o "$work/iso/boot/check"
printf 'set timeout=0\nmenuentry check { multiboot /boot/check ; boot }\n' > "$work/iso/boot/grub/grub.cfg"
chroot "$tree" grub-mkrescue -o "$inside/check.iso" "$inside/iso" > "$work/grub.txt" 2>&1
cat > "$work/bochsrc" << SETTINGS
cpu: model=sapphire_rapids, ips=50000000
megs: 1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$inside/check.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$inside/serial.txt
display_library: rfb, options="timeout=0"
SETTINGS
echo c > "$work/commands"
chroot "$tree" bochs -q -f "$inside/bochsrc" -rc "$inside/commands" < /dev/null > "$work/bochs.txt" 2>&1 &
emulator=$!
trap 'kill $emulator 2> /dev/null; pkill -f "$inside/bochsrc" || true' EXIT
for second in $(seq 300); do
    sleep 1
    if grep -q -E "ALL RIGHT|WRONG" "$work/serial.txt" 2> /dev/null; then break; fi
done
cat "$work/serial.txt"
grep -q "ALL RIGHT" "$work/serial.txt"
