#include <stdio.h>
#include "flashqla.h"
int main(void) {
    puts(fqla_status_string(FQLA_OK));
    return 0;
}
